"""LRU + frequency: among the blocks unused for longest, the one used least often leaves first."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING

from .base import EvictionPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

CANDIDATES = 16
"""How many of the oldest keys are compared; recency decides what is a candidate at all."""


class LRUFreq(EvictionPolicy):
    """Recency order, with the number of uses as judge among the oldest few keys.

    A candidate that survives because it was used more often loses one use, so that yesterday's
    favourite cannot stay for ever. Every verb is O(1) but for the pinned keys `evict` passes over.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._uses: OrderedDict[bytes, int] = OrderedDict()

    def insert(self, key: bytes) -> None:
        self._uses[key] = 1

    def hit(self, key: bytes) -> None:
        self._uses[key] += 1
        self._uses.move_to_end(key)

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        oldest = list(islice((key for key in self._uses if not pinned(key)), CANDIDATES))
        if not oldest:
            return None
        victim = min(oldest, key=self._uses.__getitem__)
        for survivor in oldest[: oldest.index(victim)]:
            self._uses[survivor] -= 1
        del self._uses[victim]
        return victim

    def remove(self, key: bytes) -> None:
        del self._uses[key]
