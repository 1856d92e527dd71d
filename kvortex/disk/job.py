"""DiskJob: blocks that move between host and disk slots together. Shared by owner and lanes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvortex.checksum import Digests
    from kvortex.core import BlockKey
    from kvortex.disk.slots import Status


class BlockRead(NamedTuple):
    """One block's read, of which several threads may read a part each."""

    digests: Digests
    ended: Iterator[int]
    """Counts the parts that ended; one `next` is one step of the interpreter."""
    broken: list[int]
    """Not empty if a part was not read."""

    @classmethod
    def of(cls, pieces: int) -> BlockRead:
        """A read that nobody began."""
        return cls([0] * pieces, itertools.count(1), [])


@dataclass(slots=True, eq=False)
class DiskJob:
    """`keys[i]` between `host_slots[i]` and `disk_slots[i]`.

    Lanes read it and set `reason`; all else that changes is the owner's.
    """

    id: int
    keys: Sequence[BlockKey]
    disk_slots: list[int]
    host_slots: list[int]
    deadline: float
    """Second after which the drive is failing that has not ended it; set anew each time it is."""
    parts: int
    reads: list[BlockRead] = field(default_factory=list)
    """Of each block; empty if this is a write."""
    generation: int = 0
    """Of the first block that is written; the next ones follow."""
    parts_left: list[int] = field(default_factory=list)
    """Of each block, how many parts are with the lanes."""
    left: int = 0
    """Of all blocks."""
    failed: dict[int, Status] = field(default_factory=dict)
    slow: set[int] = field(default_factory=set)
    """Positions that had not ended at the first deadline, and are counted for it."""
    reason: str = ""
    """Of the last error."""

    def __post_init__(self) -> None:
        self.parts_left = [self.parts] * len(self.keys)
        self.left = self.parts * len(self.keys)

    @property
    def unended(self) -> set[int]:
        """Positions of blocks of which a part is with the lanes."""
        return {position for position, left in enumerate(self.parts_left) if left}

    def end(self, position: int, status: Status, parts: int = 1) -> None:
        """Parts of a block are not with the lanes, or no longer; its first failure is kept."""
        self.parts_left[position] -= parts
        self.left -= parts
        if status:
            self.failed.setdefault(position, status)

    def give_up(self, position: int, status: Status) -> None:
        """All parts of a block that have not ended."""
        self.end(position, status, self.parts_left[position])
