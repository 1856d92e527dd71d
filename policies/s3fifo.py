"""S3-FIFO: a small queue that most keys only pass through, a main one, and ghosts."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from .base import EvictionPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL_SHARE = 10
"""The small queue is the capacity divided by this."""
MOST_USES = 3


class S3FIFO(EvictionPolicy):
    """Three static FIFO queues: new keys wait in the small one; those used meanwhile go on to the
    main one, the others leave a ghost, and a ghost that returns goes straight to the main queue.
    A key of the main queue leaves once it comes round without a use. O(1) amortised.

    Source: Yang, Zhang, Qiu, Yue, Rashmi, "FIFO queues are all you need for cache eviction",
    SOSP 2023.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._small_size = max(1, capacity // SMALL_SHARE)
        self._small: OrderedDict[bytes, int] = OrderedDict()
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def insert(self, key: bytes) -> None:
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def hit(self, key: bytes) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(MOST_USES, queue[key] + 1)

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        if len(self._small) < self._small_size:
            victim = self._from_main(pinned)
            if victim is not None:
                return victim
        victim = self._from_small(pinned)
        return self._from_main(pinned) if victim is None else victim

    def remove(self, key: bytes) -> None:
        del (self._small if key in self._small else self._main)[key]

    def _from_small(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        for _ in range(len(self._small)):
            key, uses = self._small.popitem(last=False)
            if uses > 1:
                self._main[key] = 0
            elif pinned(key):
                self._small[key] = uses
            else:
                self._ghosts[key] = None
                if len(self._ghosts) > self.capacity - self._small_size:
                    self._ghosts.popitem(last=False)
                return key
        return None

    def _from_main(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        for _ in range((MOST_USES + 1) * len(self._main)):
            key, uses = self._main.popitem(last=False)
            if uses == 0 and not pinned(key):
                return key
            self._main[key] = max(0, uses - 1)
        return None
