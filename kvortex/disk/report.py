"""What a disk store tells of itself: what became of jobs, and counters as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Self

from kvortex.disk.slots import Status

if TYPE_CHECKING:
    from kvortex.disk.format import Survivors
    from kvortex.disk.job import DiskJob

TOLD = (
    "corrupt_blocks",
    "stale_blocks",
    "invalid_records",
    "read_errors",
    "write_errors",
    "slow_blocks",
    "refused_blocks",
    "times_off",
    "removed_caches",
)
"""Counters that only the worker can count, of which the scheduler side is told."""
_COUNTED_AS = {
    Status.CORRUPT: "corrupt_blocks",
    Status.STALE: "stale_blocks",
    Status.LATE: "slow_blocks",
    Status.REFUSED: "refused_blocks",
}


@dataclass(slots=True)
class DiskCounters:
    """Since start. A block is counted when its job ended, and a slow one as soon as it is slow."""

    read_blocks: int = 0
    read_bytes: int = 0
    written_blocks: int = 0
    written_bytes: int = 0
    corrupt_blocks: int = 0
    """Read, and not the bytes that were written."""
    stale_blocks: int = 0
    """Asked for in a slot that holds another key or none; and, at start, older copies of a key."""
    invalid_records: int = 0
    """At start: torn, moved, or somebody else's."""
    read_errors: int = 0
    """Blocks that the drive failed to read."""
    write_errors: int = 0
    """Blocks that it failed to write."""
    slow_blocks: int = 0
    """Blocks that were not read by their deadline, or not written in time; some of them came later,
    or failed otherwise."""
    refused_blocks: int = 0
    """Not tried: the drive is off, behind, or may not be written faster."""
    times_off: int = 0
    """How often reading or writing was switched off after errors."""
    removed_caches: int = 0
    """Caches of other models that were removed at start."""

    @classmethod
    def at_start(cls, found: Survivors, removed: int) -> Self:
        """Of a cache in which this was found, and for which so many others were removed."""
        stale = len(found.stale)
        return cls(stale_blocks=stale, invalid_records=found.invalid, removed_caches=removed)

    def count_move(self, *, is_read: bool, blocks: int, slot_bytes: int) -> None:
        """Blocks that arrived."""
        if is_read:
            self.read_blocks += blocks
            self.read_bytes += blocks * slot_bytes
        else:
            self.written_blocks += blocks
            self.written_bytes += blocks * slot_bytes

    def count_failures(self, job: DiskJob) -> None:
        """Blocks that did not; those that came too late may have been counted while they did."""
        for position, status in job.failed.items():
            if status is Status.LATE and position in job.slow:
                continue
            name = _COUNTED_AS.get(status) or ("read_errors" if job.reads else "write_errors")
            setattr(self, name, getattr(self, name) + 1)

    def as_dict(self) -> dict[str, int]:
        """Name to number."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What became of jobs since the last report.

    `ended` has, per job, the positions that failed; its slots, host and disk, are free to be used.
    `lost` has, per job, those of the failed positions that the drive is to blame for: of a read,
    the disk does not have the bytes. The others came too late or were not tried, and can be tried
    another time. While reading or writing is off, jobs of that kind are refused; a later report
    tells that it is on again.
    """

    ended: dict[int, frozenset[int]]
    lost: dict[int, frozenset[int]] = field(default_factory=dict)
    reading_off: bool = False
    writing_off: bool = False
