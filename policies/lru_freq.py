"""LRU + frequency: recency within a rank, ranks by frequency, and a rank is lost by waiting."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from .base import EvictionPolicy
from .ghosts import NUMBER, Ghosts
from .reuse import ReuseDistance

if TYPE_CHECKING:
    from collections.abc import Callable

RANKS = 8
MOST_USES = NUMBER
"""That are counted: enough for the highest rank."""
GHOSTS = 2
"""Times the capacity: keys that left and whose uses are remembered."""


class LRUFreq(EvictionPolicy):
    """A key used n times has rank log2(n); of the lowest rank the key unused for longest leaves.

    A key that was not used for as long as keys usually take to return loses a rank, and so on: what
    was popular an hour ago protects nothing, and what was used twice outlives a burst of blocks
    seen once. How long that is, is learned from the traffic (see ReuseDistance), because it depends
    on people and programs, not on the size of the pool. Uses of keys that left are remembered for
    about twice as many keys as the pool holds. Every verb is O(1).

    The ranks are those of MQ (Zhou, Philbin, Li, USENIX 2001), whose life is tied to the capacity.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._ranks: list[OrderedDict[bytes, int]] = [OrderedDict() for _ in range(RANKS)]
        """Key to its uses, and above their eight bits the access at which it entered the rank."""
        self._oldest = 0
        """No key above the lowest rank entered its rank before this access."""
        self._left = Ghosts(GHOSTS * capacity)
        self._reuse = ReuseDistance(capacity)

    def insert(self, key: bytes) -> None:
        self._use(key, self._left.pop(key) or 0)

    def hit(self, key: bytes) -> None:
        self._use(key, self._take(key))

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        for rank in self._ranks:
            for key in rank:
                if not pinned(key):
                    self._left.put(key, rank.pop(key) & MOST_USES)
                    return key
        return None

    def remove(self, key: bytes) -> None:
        self._take(key)

    def _take(self, key: bytes) -> int:
        """Let a key go; returns its uses."""
        for rank in self._ranks:
            if key in rank:
                return rank.pop(key) & MOST_USES
        raise KeyError(key)

    def _use(self, key: bytes, uses_before: int) -> None:
        reuse = self._reuse
        reuse.access(key)
        uses = uses_before + 1 if uses_before < MOST_USES else MOST_USES
        self._ranks[uses.bit_length() - 1][key] = reuse.now << 8 | uses
        if self._oldest + reuse.typical < reuse.now:
            self._step_down()

    def _step_down(self) -> None:
        """At most one key of each rank, the one that is there for longest."""
        now, self._oldest = self._reuse.now, self._reuse.now
        for number in range(1, RANKS):
            rank = self._ranks[number]
            for key in rank:
                since = rank[key] >> 8
                self._oldest = min(self._oldest, since)
                if since + self._reuse.typical < now:
                    self._ranks[number - 1][key] = now << 8 | rank.pop(key) & MOST_USES
                break
