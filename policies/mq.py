"""MQ: one queue for each order of magnitude of uses, and a life after which a key steps down."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from .base import EvictionPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

QUEUES = 8
GHOSTS = 4
"""Times the capacity: keys that left and whose uses are remembered."""


class MQ(EvictionPolicy):
    """Multi-queue: a key used n times waits in queue log2(n); unused for `life` accesses it steps
    down one queue; the oldest key of the lowest queue leaves. Every verb is O(1).

    Source: Zhou, Philbin, Li, "The multi-queue replacement algorithm for second level buffer
    caches", USENIX 2001; life is the capacity, ghosts are four times the capacity.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queues: list[OrderedDict[bytes, int]] = [OrderedDict() for _ in range(QUEUES)]
        """Key to the access count at which its life ends."""
        self._uses: dict[bytes, int] = {}
        self._level: dict[bytes, int] = {}
        self._ghosts: OrderedDict[bytes, int] = OrderedDict()
        self._now = 0

    def insert(self, key: bytes) -> None:
        self._put(key, self._ghosts.pop(key, 0) + 1)

    def hit(self, key: bytes) -> None:
        del self._queues[self._level[key]][key]
        self._put(key, self._uses[key] + 1)

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        for queue in self._queues:
            victim = next((key for key in queue if not pinned(key)), None)
            if victim is not None:
                self._ghosts[victim] = self._drop(victim)
                if len(self._ghosts) > GHOSTS * self.capacity:
                    self._ghosts.popitem(last=False)
                return victim
        return None

    def remove(self, key: bytes) -> None:
        self._drop(key)

    def _put(self, key: bytes, uses: int) -> None:
        self._now += 1
        level = min(uses.bit_length(), QUEUES) - 1
        self._queues[level][key] = self._now + self.capacity
        self._uses[key], self._level[key] = uses, level
        self._step_down()

    def _step_down(self) -> None:
        """At most one key of each queue, its oldest."""
        for level in range(1, QUEUES):
            queue = self._queues[level]
            oldest = next(iter(queue), None)
            if oldest is not None and queue[oldest] < self._now:
                del queue[oldest]
                self._queues[level - 1][oldest] = self._now + self.capacity
                self._level[oldest] = level - 1

    def _drop(self, key: bytes) -> int:
        del self._queues[self._level.pop(key)][key]
        return self._uses.pop(key)
