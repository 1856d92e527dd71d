"""SpscRing: a ring of fixed-width records between one thread that pushes and one that pops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Records = npt.NDArray[np.int64]


class SpscRing:
    """At most `capacity` records of `width` int64 numbers, in order, without a lock.

    Each of the two counters is written by one thread only, and after the records it speaks of:
    CPython runs one thread at a time, so the other thread never sees them in another order.

    Source: Lamport, "Proving the correctness of multiprocess programs", 1977.
    """

    def __init__(self, capacity: int, width: int) -> None:
        if capacity < 1 or width < 1:
            raise ValueError(f"a ring of {capacity} records of {width} numbers cannot hold any")
        self.capacity = capacity
        self._records = np.zeros((capacity, width), np.int64)
        self._pushed = 0
        self._popped = 0

    def __len__(self) -> int:
        return self._pushed - self._popped

    def push(self, records: Records) -> int:
        """Add leading rows of an int64 (n, width) array while there is room; returns how many."""
        pushed = self._pushed
        count = min(len(records), self.capacity - (pushed - self._popped))
        start = pushed % self.capacity
        first = min(count, self.capacity - start)
        self._records[start : start + first] = records[:first]
        if count > first:
            self._records[: count - first] = records[first:count]
        self._pushed = pushed + count
        return count

    def pop(self, limit: int) -> Records:
        """Take up to `limit` records, the oldest first: an int64 (n, width) array of its own."""
        popped = self._popped
        count = min(limit, self._pushed - popped)
        start = popped % self.capacity
        first = min(count, self.capacity - start)
        taken = self._records[start : start + first].copy()
        if count > first:
            taken = np.concatenate((taken, self._records[: count - first]))
        self._popped = popped + count
        return taken
