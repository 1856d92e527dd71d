"""What `kvortex disk` does: looks into a folder of caches, checks them, removes them."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kvortex.core import ConfigError, KVortexError, printable
from kvortex.disk.folder import (
    CHECKSUMS,
    OPENING_S,
    RECORDS,
    ROOT_LOCK,
    SLOTS,
    held,
    is_held,
    namespaces,
    nobody_opening,
    opened_file,
    opened_folder,
    ranks,
    read_about,
)
from kvortex.disk.format import (
    RECORD_BYTES,
    RecordFormat,
    peek,
    stride,
)
from kvortex.disk.neighbours import remove_idle
from kvortex.disk.recount import recount
from kvortex.disk.scheme import Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LARGEST_TABLE = 1 << 30
LARGEST_SLOT = 1 << 32
"""A description that speaks of more was not written by us."""


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What one rank keeps under a namespace. Ages are in seconds."""

    namespace: str
    rank: int
    in_use: bool
    slot_bytes: int
    slots: int
    used: int
    stale: int
    """Older copies of a key."""
    invalid: int
    """Records that are torn or not ours."""
    disk_bytes: int
    newest_age: int | None
    oldest_age: int | None
    description: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Name to value, for JSON."""
        return asdict(self)


@dataclass(slots=True)
class Verified:
    """Blocks whose bytes are those that were written, and those whose are not."""

    good: int = 0
    corrupt: int = 0
    not_verifiable: int = 0
    """What the cache says of their checksums was not written by us."""
    damaged_records: int = 0
    """Whose blocks nobody can find any more: a few after a crash, many where a drive decays."""

    def count(self, good: bool | None) -> None:
        """A block, of which None is known."""
        self.good += good is True
        self.corrupt += good is False
        self.not_verifiable += good is None

    @property
    def blocks(self) -> int:
        """All of them."""
        return self.good + self.corrupt + self.not_verifiable

    def as_dict(self) -> dict[str, int]:
        """Name to number."""
        return asdict(self)


def inspect(path: Path) -> list[CacheInfo]:
    """Every rank's cache under a `disk_path`; also while servers run.

    Raises:
        ConfigError: it cannot be read.
    """
    with _opened(path) as root, nobody_opening(root):
        return [_info(folder, namespace, rank) for namespace, rank, folder in _folders(path)]


def verify(path: Path, progress: Callable[[int, int], None]) -> Verified:
    """Read every block and compare its checksum.

    Args:
        path: a `disk_path` that no server uses.
        progress: told blocks done and blocks in all.

    Raises:
        ConfigError: it cannot be read, or is in use.
    """
    require_idle(path)
    infos = inspect(path)
    total = sum(info.used for info in infos)
    verified = Verified(damaged_records=sum(info.invalid for info in infos))
    for namespace, rank, folder in _folders(path):
        for good in _checks(folder, namespace, rank):
            verified.count(good)
            progress(verified.blocks, total)
    return verified


def clear(path: Path) -> int:
    """Remove every cache under a `disk_path`; returns how many namespaces that were.

    Raises:
        ConfigError: one is in use; then nothing was removed.
        KVortexError: not all could be removed.
    """
    require_idle(path)
    with _opened(path) as root, held(root, ROOT_LOCK, patience=OPENING_S):
        removed = remove_idle(root)
        if left := namespaces(root):
            raise KVortexError(f"{path}: {len(left)} caches hold files that are not KVortex's")
    return removed


def count_caches(path: Path) -> int:
    """How many namespaces are under a `disk_path`, also those that no rank has filled.

    Raises:
        ConfigError: it cannot be read.
    """
    with _opened(path) as root:
        return len(namespaces(root))


def table(infos: list[CacheInfo]) -> str:
    """The caches in columns."""
    head = ("namespace", "rank", "slots", "used", "block", "on disk", "newest", "oldest", "in use")
    rows = [head, *(_row(info) for info in infos)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) for row in rows]
    about = [
        printable(f"{info.namespace[:12]}: " + ", ".join(f"{k} {v}" for k, v in told.items()))
        for info in infos
        if (told := info.description) and info.rank == 0
    ]
    return "\n".join(line.rstrip() for line in [*lines, *about])


def _row(info: CacheInfo) -> tuple[str, ...]:
    return (
        info.namespace[:12],
        str(info.rank),
        str(info.slots),
        str(info.used),
        _size(info.slot_bytes),
        _size(info.disk_bytes),
        _age(info.newest_age),
        _age(info.oldest_age),
        "yes" if info.in_use else "no",
    )


def _folders(path: Path) -> Iterator[tuple[str, int, int]]:
    """Namespace, rank and open folder of each cache."""
    with _opened(path) as root:
        for namespace in namespaces(root):
            try:
                with opened_folder(namespace, root) as above:
                    for rank in ranks(above):
                        with opened_folder(rank, above) as folder:
                            yield namespace, int(rank.removeprefix("rank-")), folder
            except OSError:
                continue  # a link, or removed meanwhile


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        with opened_folder(path) as root:
            yield root
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def require_idle(path: Path) -> None:
    """Raises ConfigError where a server uses a cache that is there."""
    for info in inspect(path):
        if info.in_use:
            raise ConfigError(
                f"{path}: a server uses {info.namespace[:12]} (rank {info.rank}); stop it first"
            )


def _info(folder: int, namespace: str, rank: int) -> CacheInfo:
    about = read_about(folder)
    slot_bytes = _slot_bytes(about)
    packed = _read_records(folder)
    found = RecordFormat(bytes.fromhex(namespace), rank, slot_bytes).read_table(memoryview(packed))
    ages = int(time.time()) - found.written_at
    description = about.get("namespace")
    return CacheInfo(
        namespace,
        rank,
        is_held(folder),
        slot_bytes,
        len(packed) // RECORD_BYTES,
        len(found.slots),
        len(found.stale),
        found.invalid,
        sum(_disk_bytes(folder, name) for name in (RECORDS, SLOTS)),
        int(ages.min()) if len(ages) else None,
        int(ages.max()) if len(ages) else None,
        description if isinstance(description, dict) else {},
    )


def _checks(folder: int, namespace: str, rank: int) -> Iterator[bool | None]:
    """Whether each block is what was written; None where nobody can tell."""
    about = read_about(folder)
    slot_bytes = _slot_bytes(about)
    scheme = Scheme.read(about.get(CHECKSUMS), slot_bytes)
    packed = _read_records(folder)
    found = RecordFormat(bytes.fromhex(namespace), rank, slot_bytes).read_table(memoryview(packed))
    for slot in sorted(found.slots.tolist()):
        record = peek(packed, slot)
        if scheme is None or record is None:
            yield None
            continue
        block = memoryview(_read_block(folder, slot_bytes, slot * stride(slot_bytes)))
        whole = len(block) == slot_bytes
        yield whole and recount(scheme, record.key, block) == record.checksum


def _read_block(folder: int, size: int, offset: int) -> bytearray:
    """As much of it as the drive gives back."""
    try:
        with opened_file(SLOTS, folder) as file:
            return bytearray(os.pread(file, size, offset))
    except OSError:
        return bytearray()


def _slot_bytes(about: dict[str, Any]) -> int:
    told = about.get("slot_bytes")
    return told if isinstance(told, int) and 0 < told < LARGEST_SLOT else 1


def _read_records(folder: int) -> bytes:
    try:
        with opened_file(RECORDS, folder) as file:
            packed = os.pread(file, min(os.fstat(file).st_size, LARGEST_TABLE), 0)
    except OSError:
        return b""
    return packed[: len(packed) // RECORD_BYTES * RECORD_BYTES]


def _disk_bytes(folder: int, name: str) -> int:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_blocks * 512
    except OSError:
        return 0


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, length in (("s", 60), ("min", 60), ("h", 24)):
        if seconds < length:
            return f"{seconds:.3g} {unit}"
        seconds /= length
    return f"{seconds:.3g} d"
