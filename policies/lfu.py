"""LFU: the block used least often leaves first, the oldest among equals."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from .base import EvictionPolicy

if TYPE_CHECKING:
    from collections.abc import Callable


class LFU(EvictionPolicy):
    """Least frequently used, with one ordered bucket of keys for each count of uses.

    Source: Shah, Mitra, Matani, "An O(1) algorithm for implementing the LFU cache eviction
    scheme", 2010. `evict` looks at the buckets in order of count, of which there are few.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._uses: dict[bytes, int] = {}
        self._buckets: dict[int, OrderedDict[bytes, None]] = {}

    def insert(self, key: bytes) -> None:
        self._put(key, 1)

    def hit(self, key: bytes) -> None:
        self._put(key, self._take(key) + 1)

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        for uses in sorted(self._buckets):
            victim = next((key for key in self._buckets[uses] if not pinned(key)), None)
            if victim is not None:
                self._take(victim)
                return victim
        return None

    def remove(self, key: bytes) -> None:
        self._take(key)

    def _put(self, key: bytes, uses: int) -> None:
        self._uses[key] = uses
        self._buckets.setdefault(uses, OrderedDict())[key] = None

    def _take(self, key: bytes) -> int:
        uses = self._uses.pop(key)
        bucket = self._buckets[uses]
        del bucket[key]
        if not bucket:
            del self._buckets[uses]
        return uses
