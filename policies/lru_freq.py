"""LRU + frequency: recency within a rank, ranks by frequency, and a rank is lost by waiting."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from .base import EvictionPolicy
from .reuse import ReuseDistance

if TYPE_CHECKING:
    from collections.abc import Callable

RANKS = 8


class LRUFreq(EvictionPolicy):
    """A key used n times has rank log2(n); of the lowest rank the key unused for longest leaves.

    A key that was not used for as long as keys usually take to return loses a rank, and so on: what
    was popular an hour ago protects nothing, and what was used twice outlives a burst of blocks
    seen once. How long that is, is learned from the traffic (see ReuseDistance), because it depends
    on people and programs, not on the size of the pool. Uses of keys that left are remembered for
    as many keys as the pool holds. Every verb is O(1).

    The ranks are those of MQ (Zhou, Philbin, Li, USENIX 2001), whose life is tied to the capacity.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._ranks: list[OrderedDict[bytes, float]] = [OrderedDict() for _ in range(RANKS)]
        """Key to the access at which it loses its rank; the oldest access first."""
        self._rank: dict[bytes, int] = {}
        self._uses: dict[bytes, int] = {}
        self._left: OrderedDict[bytes, int] = OrderedDict()
        self._reuse = ReuseDistance(capacity)

    def insert(self, key: bytes) -> None:
        self._reuse.access(key)
        self._put(key, self._left.pop(key, 0) + 1)

    def hit(self, key: bytes) -> None:
        self._reuse.access(key)
        del self._ranks[self._rank[key]][key]
        self._put(key, self._uses[key] + 1)

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        for rank in self._ranks:
            victim = next((key for key in rank if not pinned(key)), None)
            if victim is not None:
                self._left[victim] = self._drop(victim)
                if len(self._left) > self.capacity:
                    self._left.popitem(last=False)
                return victim
        return None

    def remove(self, key: bytes) -> None:
        self._drop(key)

    def _put(self, key: bytes, uses: int) -> None:
        self._uses[key] = uses
        self._enter(key, min(uses.bit_length(), RANKS) - 1)
        for rank in range(1, RANKS):
            oldest = next(iter(self._ranks[rank]), None)
            if oldest is not None and self._ranks[rank][oldest] < self._reuse.now:
                del self._ranks[rank][oldest]
                self._enter(oldest, rank - 1)

    def _enter(self, key: bytes, rank: int) -> None:
        self._rank[key] = rank
        self._ranks[rank][key] = self._reuse.now + self._reuse.typical

    def _drop(self, key: bytes) -> int:
        del self._ranks[self._rank.pop(key)][key]
        return self._uses.pop(key)
