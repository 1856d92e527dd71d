"""ARC: recency and frequency share the pool, and ghosts say which of them deserves more of it."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from .base import EvictionPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

Keys = OrderedDict[bytes, None]


class ARC(EvictionPolicy):
    """Adaptive replacement cache: keys used once (`_once`) and more often (`_often`), each with the
    ghosts of those that left it; a ghost that returns shifts the balance. Every verb is O(1).

    Source: Megiddo, Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._once: Keys = OrderedDict()
        self._often: Keys = OrderedDict()
        self._once_ghosts: Keys = OrderedDict()
        self._often_ghosts: Keys = OrderedDict()
        self._target = 0.0
        """How many keys used once the pool should hold."""
        self._expected: bytes | None = None

    def expect(self, key: bytes) -> None:
        self._expected = key
        one, often = len(self._once_ghosts), len(self._often_ghosts)
        if key in self._once_ghosts:
            self._target = min(float(self.capacity), self._target + max(1.0, often / one))
        elif key in self._often_ghosts:
            self._target = max(0.0, self._target - max(1.0, one / often))

    def insert(self, key: bytes) -> None:
        if key in self._once_ghosts:
            del self._once_ghosts[key]
            self._often[key] = None
        elif key in self._often_ghosts:
            del self._often_ghosts[key]
            self._often[key] = None
        else:
            self._once[key] = None
            self._trim()

    def hit(self, key: bytes) -> None:
        self._once.pop(key, None)
        self._often[key] = None
        self._often.move_to_end(key)

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        once, often = (self._once, self._once_ghosts), (self._often, self._often_ghosts)
        over = len(self._once) > self._target or (
            self._expected in self._often_ghosts and len(self._once) == self._target
        )
        for keys, ghosts in (once, often) if self._once and over else (often, once):
            victim = next((key for key in keys if not pinned(key)), None)
            if victim is not None:
                del keys[victim]
                ghosts[victim] = None
                return victim
        return None

    def remove(self, key: bytes) -> None:
        if key in self._once:
            del self._once[key]
        else:
            del self._often[key]

    def _trim(self) -> None:
        """Keep as many ghosts as the paper does: `_once` with its own at most a pool, all two."""
        while self._once_ghosts and len(self._once) + len(self._once_ghosts) > self.capacity:
            self._once_ghosts.popitem(last=False)
        resident = len(self._once) + len(self._often)
        ghosts = len(self._once_ghosts) + len(self._often_ghosts)
        while self._often_ghosts and resident + ghosts > 2 * self.capacity:
            self._often_ghosts.popitem(last=False)
            ghosts -= 1
