"""FIFO: the block stored first leaves first, however often it was used."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from .base import EvictionPolicy

if TYPE_CHECKING:
    from collections.abc import Callable


class FIFO(EvictionPolicy):
    """First in, first out; the floor that others are measured against. Every verb is O(1)."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def insert(self, key: bytes) -> None:
        self._order[key] = None

    def hit(self, key: bytes) -> None: ...

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        victim = next((key for key in self._order if not pinned(key)), None)
        if victim is not None:
            del self._order[victim]
        return victim

    def remove(self, key: bytes) -> None:
        del self._order[key]
