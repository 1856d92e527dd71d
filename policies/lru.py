"""LRU: the block unused for longest leaves first."""

from __future__ import annotations

from .fifo import FIFO


class LRU(FIFO):
    """Least recently used: a queue in which a use is as good as an insertion.

    Every verb is O(1), `evict` but for the pinned keys it passes over.
    """

    def hit(self, key: bytes) -> None:
        self._order.move_to_end(key)
