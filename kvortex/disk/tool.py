"""What `kvortex disk` does: looks into a folder of caches, checks them, removes them."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from kvortex.core import ConfigError, KVortexError
from kvortex.disk.cache_info import CacheInfo, Inspection
from kvortex.disk.contents import Contents, why_unreadable, why_untried
from kvortex.disk.folder import (
    LOCK,
    OPENING_S,
    RECORDS,
    ROOT_LOCK,
    SLOTS,
    held,
    is_held,
    namespaces,
    nobody_opening,
    opened_folder,
    ranks,
)
from kvortex.disk.format import RECORD_BYTES
from kvortex.disk.leftovers import leftovers, shown
from kvortex.disk.neighbours import remove_idle
from kvortex.disk.verified import Verified

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def inspect(path: Path) -> Inspection:
    """Every rank's cache under a `disk_path`; also while servers run.

    Raises:
        ConfigError: it cannot be opened.
        KVortexError: its caches cannot be listed.
    """
    found = Inspection()
    with _opened(path) as root:
        for namespace, rank, folder in _folders(path, root, found.unreadable):
            contents = Contents(folder, namespace, rank)
            info = _info(folder, namespace, rank, _in_use(root, folder), contents)
            found.caches.append(info)
            if info.in_use is None:
                why = why_untried(folder, LOCK) or "cannot be tried"
                found.untried[f"{namespace}/rank-{rank}/{LOCK}"] = why
            cut_off = {} if info.in_use else contents.cut_off()
            _note(found.unreadable, namespace, rank, cut_off | contents.unreadable)
    return found


def verify(path: Path, progress: Callable[[int, int], None]) -> Verified:
    """Read every block and compare its checksum.

    A server that starts meanwhile is not held up: that may take hours. What it changes is not
    compared.

    Args:
        path: a `disk_path` that no server uses.
        progress: told blocks done and blocks in all.

    Raises:
        ConfigError: it cannot be opened, or is in use.
        KVortexError: its caches cannot be listed.
    """
    seen = require_idle(path)
    verified = Verified(untried=seen.untried)
    missed = {(info.namespace, info.rank) for info in seen.caches}
    with _opened(path) as root:
        for namespace, rank, folder in _folders(path, root, verified.unreadable):
            verified.caches_read += 1
            verified.disturbed |= (namespace, rank) not in missed
            missed.discard((namespace, rank))
            contents = Contents(folder, namespace, rank)
            _check(contents, verified, lambda done: progress(done, max(seen.blocks, done)))
            cut_off = contents.cut_off()
            _note(verified.unreadable, namespace, rank, cut_off | contents.unreadable)
            verified.disturbed |= not contents.is_as_it_was() or _in_use(root, folder) is True
    verified.disturbed |= bool(missed)
    return verified


def _check(contents: Contents, verified: Verified, progress: Callable[[int], None]) -> None:
    for slot in sorted(contents.found.slots.tolist()):
        verified.count(contents.check(slot))
        progress(verified.blocks)
    damaged = contents.count_damaged()
    verified.damaged_records += damaged
    verified.not_served += contents.found.invalid - damaged


def clear(path: Path) -> int:
    """Remove every cache under a `disk_path`; returns how many namespaces that were.

    Raises:
        ConfigError: one is in use, or may be; then nothing was removed.
        KVortexError: not all could be removed.
    """
    require_idle(path, certainly=True)
    with _opened(path) as root, _nobody_else(path, root):
        before = len(_listed(path, root))
        remove_idle(root)
        left = leftovers(root)
        removed = before - len(_listed(path, root))
    if left:
        raise KVortexError(f"{path}: {removed} of {before} caches removed; {shown(left)}")
    return removed


@contextmanager
def _nobody_else(path: Path, root: int) -> Iterator[None]:
    """Meanwhile no server opens a cache."""
    with ExitStack() as stack:
        try:
            stack.enter_context(held(root, ROOT_LOCK, patience=OPENING_S))
        except BlockingIOError:
            told = "another server is making or removing caches there; try again"
            raise ConfigError(f"{path}: nothing was removed: {told}") from None
        except (ConfigError, OSError) as error:
            why = why_untried(root, ROOT_LOCK) or f"cannot be held: {error}"
            raise ConfigError(_perhaps_in_use(path, ROOT_LOCK, why)) from None
        yield


def _perhaps_in_use(path: Path, lock: str, why: str) -> str:
    """Nobody is told to remove a lock that a server may hold: a second one could open the cache."""
    return (
        f"{path}: nothing was removed, as a server may be using it: {lock} {why}; run this as the "
        "user of the servers, where the drive can be written, or stop them and remove the folder "
        "yourself"
    )


def count_caches(path: Path) -> int:
    """How many namespaces are under a `disk_path`, also those that no rank has filled.

    Raises:
        ConfigError: it cannot be opened.
        KVortexError: its caches cannot be listed.
    """
    with _opened(path) as root:
        return len(_listed(path, root))


def require_idle(path: Path, *, certainly: bool = False) -> Inspection:
    """What is there.

    Raises:
        ConfigError: a server uses a cache of it; or, `certainly`, nobody knows whether one does.
    """
    found = inspect(path)
    for info in found.caches:
        if info.in_use:
            raise ConfigError(
                f"{path}: a server uses {info.namespace[:12]} (rank {info.rank}); stop it first"
            )
    if certainly:
        for lock, why in found.untried.items():
            raise ConfigError(_perhaps_in_use(path, lock, why))
    return found


def _folders(path: Path, root: int, unreadable: dict[str, str]) -> Iterator[tuple[str, int, int]]:
    """Namespace, rank and open folder of each cache; what cannot be opened is noted."""
    for namespace in _listed(path, root):
        with ExitStack() as outer:
            above = _entered(outer, root, namespace, namespace, unreadable)
            for rank in [] if above is None else _ranks(above, namespace, unreadable):
                with ExitStack() as inner:
                    place = f"{namespace}/{rank}"
                    folder = _entered(inner, above, rank, place, unreadable)
                    if folder is not None:
                        yield namespace, int(rank.removeprefix("rank-")), folder


def _entered(
    stack: ExitStack, above: int | None, name: str, place: str, unreadable: dict[str, str]
) -> int | None:
    """A folder, open as long as `stack`."""
    try:
        return stack.enter_context(opened_folder(name, above))
    except FileNotFoundError:
        return None  # removed meanwhile
    except OSError as error:
        unreadable[place] = why_unreadable(above, name, error)
        return None


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    with ExitStack() as stack:
        try:
            root = stack.enter_context(opened_folder(path))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        yield root


def _listed(path: Path, root: int) -> list[str]:
    """The caches under an open `disk_path`."""
    try:
        return namespaces(root)
    except OSError as error:
        raise KVortexError(f"{path}: its caches cannot be listed: {error.strerror}") from None


def _ranks(namespace: int, name: str, unreadable: dict[str, str]) -> list[str]:
    try:
        return ranks(namespace)
    except OSError as error:
        unreadable[name] = f"cannot be listed: {error.strerror}"
        return []


def _in_use(root: int, folder: int) -> bool | None:
    with nobody_opening(root):  # no longer: a server that starts waits for it
        return is_held(folder)


def _note(unreadable: dict[str, str], namespace: str, rank: int, files: dict[str, str]) -> None:
    for name, why in files.items():
        unreadable[f"{namespace}/rank-{rank}/{name}"] = why


def _info(
    folder: int, namespace: str, rank: int, in_use: bool | None, contents: Contents
) -> CacheInfo:
    found, readable = contents.found, contents.has_table
    ages = int(time.time()) - found.written_at
    description = contents.about.get("namespace")
    return CacheInfo(
        namespace,
        rank,
        in_use,
        contents.slot_bytes if contents.knows_size else None,
        len(contents.packed) // RECORD_BYTES if readable else None,
        len(found.slots) if readable else None,
        len(found.stale) if readable else None,
        found.invalid if readable else None,
        contents.count_damaged() if readable else None,
        sum(_disk_bytes(folder, name) for name in (RECORDS, SLOTS)),
        int(ages.min()) if len(ages) else None,
        int(ages.max()) if len(ages) else None,
        description if isinstance(description, dict) else {},
    )


def _disk_bytes(folder: int, name: str) -> int:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_blocks * 512
    except OSError:
        return 0
