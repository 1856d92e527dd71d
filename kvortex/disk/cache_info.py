"""CacheInfo: what `kvortex disk inspect` says of one rank's cache; and its table of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kvortex.core import printable, shown_bytes

UNKNOWN = "not known"


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What one rank keeps under a namespace. Ages are in seconds; None is what nobody can tell."""

    namespace: str
    rank: int
    in_use: bool | None
    slot_bytes: int | None
    slots: int | None
    used: int | None
    stale: int | None
    """Older copies of a key."""
    invalid: int | None
    """Records that are torn or not ours."""
    damaged: int | None
    """Of these, the ones that are torn, or in the place of another."""
    disk_bytes: int
    newest_age: int | None
    oldest_age: int | None
    description: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Name to value, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Inspection:
    """The caches under a `disk_path`, and what there could not be read."""

    caches: list[CacheInfo] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Names below the `disk_path`, and why each."""
    untried: dict[str, str] = field(default_factory=dict)
    """Likewise, locks that cannot be tried: whether a server holds them is not known."""

    @property
    def is_whole(self) -> bool:
        """Whether all was read, and is as it was written, as far as one sees who only looks:
        while a server writes, some records may be half written."""
        damaged = any(info.damaged for info in self.caches if info.in_use is False)
        return not damaged and not self.unreadable

    @property
    def blocks(self) -> int:
        """How many blocks are known to be there."""
        return sum(info.used or 0 for info in self.caches)

    def as_dict(self) -> dict[str, Any]:
        """Name to value, for JSON."""
        return asdict(self)


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
    damaged = [
        f"{info.namespace[:12]} (rank {info.rank}): {info.damaged} records are damaged"
        for info in infos
        if info.damaged and info.in_use is False
    ]
    return "\n".join(line.rstrip() for line in [*lines, *about, *damaged])


def _row(info: CacheInfo) -> tuple[str, ...]:
    return (
        info.namespace[:12],
        str(info.rank),
        UNKNOWN if info.slots is None else str(info.slots),
        UNKNOWN if info.used is None else str(info.used),
        UNKNOWN if info.slot_bytes is None else shown_bytes(info.slot_bytes),
        shown_bytes(info.disk_bytes),
        _age(info.newest_age),
        _age(info.oldest_age),
        {True: "yes", False: "no", None: UNKNOWN}[info.in_use],
    )


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, length in (("s", 60), ("min", 60), ("h", 24)):
        if seconds < length:
            return f"{seconds:.3g} {unit}"
        seconds /= length
    return f"{seconds:.3g} d"
