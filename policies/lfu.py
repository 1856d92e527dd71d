"""LFU: the block used least often leaves first; old uses lose their weight."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from .base import EvictionPolicy

if TYPE_CHECKING:
    from collections.abc import Callable


class LFU(EvictionPolicy):
    """Least frequently used with dynamic ageing: a key weighs its uses plus the weight at which
    keys leave by now, so that yesterday's favourite cannot stay for ever.

    Keys lie in one ordered bucket for each weight, of equals the one unused for longest first.
    The least weight only grows, so that finding it is O(1) amortised.

    Source: Arlitt, Friedrich, Jin, "Performance evaluation of Web proxy cache replacement
    policies", 1999 (LFU-DA); the buckets as in Shah, Mitra, Matani, 2010.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._uses: dict[bytes, int] = {}
        self._weight: dict[bytes, int] = {}
        self._buckets: dict[int, OrderedDict[bytes, None]] = {}
        self._age = 0

    def insert(self, key: bytes) -> None:
        self._put(key, 1)

    def hit(self, key: bytes) -> None:
        self._put(key, self._take(key) + 1)

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        if not self._uses:
            return None
        while self._age not in self._buckets:
            self._age += 1
        victim = self._unpinned(self._age, pinned)
        if victim is None:  # every key of the least weight is in use, which is rare
            others = (self._unpinned(weight, pinned) for weight in sorted(self._buckets))
            victim = next((key for key in others if key is not None), None)
        if victim is not None:
            self._take(victim)
        return victim

    def remove(self, key: bytes) -> None:
        self._take(key)

    def _unpinned(self, weight: int, pinned: Callable[[bytes], bool]) -> bytes | None:
        return next((key for key in self._buckets[weight] if not pinned(key)), None)

    def _put(self, key: bytes, uses: int) -> None:
        weight = self._age + uses
        self._uses[key], self._weight[key] = uses, weight
        self._buckets.setdefault(weight, OrderedDict())[key] = None

    def _take(self, key: bytes) -> int:
        weight = self._weight.pop(key)
        bucket = self._buckets[weight]
        del bucket[key]
        if not bucket:
            del self._buckets[weight]
        return self._uses.pop(key)
