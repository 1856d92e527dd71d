"""RankFolder: the folder in which one rank keeps its cache, held by a lock; and its neighbours.

    disk_path/<namespace>/rank-<n>/   lock, namespace.json, records, slots

Everything below `disk_path` is reached through open folders and never through a symbolic link, and
only files of these names are ever removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import stat
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

from kvortex.core import ConfigError
from kvortex.disk.file import SAFE, open_own

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

LOCK, ABOUT, RECORDS, SLOTS = "lock", "namespace.json", "records", "slots"
NEW_ABOUT = ABOUT + ".new"
OWN_NAMES = (NEW_ABOUT, ABOUT, RECORDS, SLOTS, LOCK)
"""In the order in which they are removed: the lock is the last."""
ROOT_LOCK = ".kvortex-lock"
LIFE = "life"
"""In what a folder says of itself: drawn by each server that opens it."""
CHECKSUMS = "checksums"
"""There, too: how those of its records were made."""
OPENING_S = 60.0
"""How long another server may take to make or remove caches."""
SILENT_S, RETRY_S = 2.0, 0.05
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
LONGEST_ABOUT = 1 << 20
_NAMESPACE = re.compile(r"[0-9a-f]{32}")
_RANK = re.compile(r"rank-\d{1,9}")


class RankFolder:
    """An open folder that no other server can open meanwhile; `fd` is its descriptor.

    Args:
        root: the `disk_path`.
        namespace: digest that names the cache.
        rank: whose folder it is.
        life: that `describe` was told when the folder was open before: it has to be there still, as
            it was left. None makes it if need be.

    Raises:
        ConfigError: another server holds it, or something is there that is not ours.
        OSError: it cannot be made or opened.
    """

    def __init__(self, root: Path, namespace: bytes, rank: int, life: str | None = None) -> None:
        self.namespace = namespace.hex()
        self.path = root / self.namespace / f"rank-{rank}"
        make = life is None
        with ExitStack() as stack:
            self.root = stack.enter_context(_made_root(root) if make else opened_folder(root))
            with self.nobody_else_opening(make=make):
                above = stack.enter_context(_own_folder(self.root, self.namespace, make=make))
                self.fd = stack.enter_context(_own_folder(above, self.path.name, make=make))
                stack.enter_context(self._held_alone(make=make))
                if not make and read_about(self.fd).get(LIFE) != life:
                    raise ConfigError(
                        "another server used the cache meanwhile; start this one anew"
                    )
            self._held = stack.pop_all()

    @contextmanager
    def nobody_else_opening(self, *, make: bool = True) -> Iterator[None]:
        """Meanwhile no other server makes, opens or removes a cache under the same `disk_path`."""
        patience = OPENING_S if make else SILENT_S  # to open again is tried again anyway
        with held(self.root, ROOT_LOCK, patience=patience, create=make):
            yield

    def describe(self, about: Mapping[str, Any]) -> None:
        """Keep `about` as JSON, for people who look into the folder."""
        text = json.dumps(dict(about), indent=1).encode()
        try:
            _written(self.fd, NEW_ABOUT, text)
            os.rename(NEW_ABOUT, ABOUT, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(NEW_ABOUT, dir_fd=self.fd)
            if error.errno not in NO_ROOM:
                raise
            _written(self.fd, ABOUT, text)  # a full disk has room where the last one is

    def close(self) -> None:
        """Let others open it. May be called twice."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _held_alone(self, *, make: bool) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(held(self.fd, LOCK, create=make))
            except BlockingIOError:
                holder = _text(self.fd, LOCK, 32).strip() or "unknown"
                raise ConfigError(
                    f"another server (process {holder}) keeps its cache of the same model there; "
                    "give each server a disk_path of its own, or end what a killed one left behind"
                ) from None
            os.ftruncate(lock, os.pwrite(lock, f"{os.getpid()}\n".encode(), 0))
            yield


def namespaces(root: int) -> list[str]:
    """Names of the caches under an open `disk_path`."""
    return sorted(name for name in os.listdir(root) if _NAMESPACE.fullmatch(name))


def ranks(namespace: int) -> list[str]:
    """Names of the folders in an open cache, one of each rank."""
    found = [name for name in os.listdir(namespace) if _RANK.fullmatch(name)]
    return sorted(found, key=lambda name: int(name[5:]))


@contextmanager
def opened_folder(name: str | Path, above: int | None = None) -> Iterator[int]:
    """A descriptor of a folder; below `above` it must not be a symbolic link."""
    flags = OPEN_FOLDER if above is None else OPEN_FOLDER | os.O_NOFOLLOW
    fd = os.open(name, flags, dir_fd=above)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def opened_file(name: str, folder: int) -> Iterator[int]:
    """A descriptor to read a file of an open folder; FileNotFoundError if it is no regular one."""
    fd = os.open(name, os.O_RDONLY | SAFE, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        yield fd
    finally:
        os.close(fd)


def read_about(rank: int) -> dict[str, Any]:
    """What the folder says of itself, empty if that cannot be read."""
    try:
        about = json.loads(_text(rank, ABOUT, LONGEST_ABOUT))
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


@contextmanager
def nobody_opening(root: int) -> Iterator[None]:
    """Meanwhile no server opens a cache under an open `disk_path`, and none is refused for it."""
    with ExitStack() as stack:
        with contextlib.suppress(OSError, ConfigError):  # no server was ever here, or not as us
            stack.enter_context(held(root, ROOT_LOCK, patience=OPENING_S, create=False))
        yield


def is_held(rank: int) -> bool | None:
    """Whether a server has an open rank's folder in use, None if its lock cannot be tried, as by
    another user; ask while `nobody_opening`."""
    try:
        with held(rank, LOCK, create=False):
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except (OSError, ConfigError):
        return None


def _text(folder: int, name: str, longest: int) -> str:
    try:
        with opened_file(name, folder) as fd:
            return os.pread(fd, longest, 0).decode("utf-8", "replace")
    except OSError:
        return ""


def _written(folder: int, name: str, content: bytes) -> None:
    """A file of ours that has this content, also after a power cut: a mount that returns is known
    by it. The blocks that it has are used again."""
    fd = open_own(folder, name, create=True)
    try:
        os.ftruncate(fd, os.pwrite(fd, content, 0))
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _made_root(root: Path) -> Iterator[int]:
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700)
    except FileExistsError:
        pass
    with opened_folder(root) as fd:
        yield fd


@contextmanager
def _own_folder(above: int, name: str, *, make: bool) -> Iterator[int]:
    """A folder of ours, 0700."""
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=above)
    if not stat.S_ISDIR(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
        raise ConfigError(f"{name} is a link or no folder; remove it or name another disk_path")
    with opened_folder(name, above) as fd:
        if os.fstat(fd).st_uid != os.geteuid():
            raise ConfigError(f"{name} belongs to another user; name another disk_path")
        os.fchmod(fd, 0o700)
        yield fd


@contextmanager
def held(folder: int, name: str, *, patience: float = 0, create: bool = True) -> Iterator[int]:
    """A locked file, which another process may have for `patience` seconds before we give up.

    Raises:
        BlockingIOError: it still has it.
    """
    fd = open_own(folder, name, create=create)
    try:
        _lock(fd, name, patience)
        yield fd
    finally:
        os.close(fd)


def _lock(fd: int, name: str, patience: float) -> None:
    """Tells after a while what it waits for; a holder that is stopped might have it for ever."""
    began, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - began
            if waited >= patience:
                raise
            if waited > SILENT_S and not told:
                told = True
                logger.warning(
                    "Disk cache: waiting up to %.0f s for another server, or a `kvortex disk`, "
                    "that holds %s.",
                    patience,
                    name,
                )
            time.sleep(RETRY_S)
