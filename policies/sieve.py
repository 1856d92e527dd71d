"""SIEVE: a hand goes round a queue and takes the first block that was not used since it passed."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from .base import EvictionPolicy

if TYPE_CHECKING:
    from collections.abc import Callable


class Sieve(EvictionPolicy):
    """Keys stay in order of insertion; the hand moves from the oldest to the newest, clears marks
    of use on its way, and evicts the first key without one. O(1) amortised.

    The queue is kept in two parts: what the hand has passed in this round, and what lies ahead.

    Source: Zhang, Yang, Yue, Vigfusson, Rashmi, "SIEVE is simpler than LRU", NSDI 2024.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._passed: OrderedDict[bytes, bool] = OrderedDict()
        self._ahead: OrderedDict[bytes, bool] = OrderedDict()
        """Key to whether it was used since the hand was there."""

    def insert(self, key: bytes) -> None:
        self._go_round()
        self._ahead[key] = False

    def hit(self, key: bytes) -> None:
        (self._ahead if key in self._ahead else self._passed)[key] = True

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        for _ in range(2 * (len(self._ahead) + len(self._passed))):
            self._go_round()
            key, used = self._ahead.popitem(last=False)
            if not used and not pinned(key):
                return key
            self._passed[key] = used and pinned(key)
        return None

    def remove(self, key: bytes) -> None:
        del (self._ahead if key in self._ahead else self._passed)[key]

    def _go_round(self) -> None:
        """A hand that has passed the newest key begins at the oldest, whatever comes next."""
        if not self._ahead:
            self._ahead, self._passed = self._passed, self._ahead
