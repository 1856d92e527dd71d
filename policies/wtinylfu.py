"""W-TinyLFU: a small window for the new, and a frequency sketch at the door of the rest."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from .base import EvictionPolicy
from .sketch import FrequencySketch

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW_SHARE = 100
"""The window is the capacity divided by this."""
PROTECTED_SHARE = 0.8
"""Of the main part."""


class WTinyLFU(EvictionPolicy):
    """Windowed TinyLFU: what falls out of the window stays only if it was used more often than the
    main part's own victim; the main part is a segmented LRU. Every verb is O(1).

    Source: Einziger, Friedman, Manes, "TinyLFU: a highly efficient cache admission policy",
    ACM Transactions on Storage, 2017.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._window_size = max(1, capacity // WINDOW_SHARE)
        self._protected_size = int((capacity - self._window_size) * PROTECTED_SHARE)
        self._window: OrderedDict[bytes, None] = OrderedDict()
        self._probation: OrderedDict[bytes, None] = OrderedDict()
        self._protected: OrderedDict[bytes, None] = OrderedDict()
        self._sketch = FrequencySketch(capacity)

    def insert(self, key: bytes) -> None:
        self._sketch.add(key)
        self._window[key] = None
        while len(self._window) > self._window_size:  # while the pool fills
            self._probation[self._window.popitem(last=False)[0]] = None

    def hit(self, key: bytes) -> None:
        self._sketch.add(key)
        if key in self._window:
            self._window.move_to_end(key)
        elif key in self._protected:
            self._protected.move_to_end(key)
        else:
            del self._probation[key]
            self._protected[key] = None
            while len(self._protected) > self._protected_size:
                self._probation[self._protected.popitem(last=False)[0]] = None

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        parts = (self._window, self._probation, self._protected)
        oldest = [next((key for key in part if not pinned(key)), None) for part in parts]
        candidate, victim = oldest[0], oldest[1] or oldest[2]
        if candidate is not None and len(self._window) < self._window_size and victim is not None:
            candidate = None  # the window has room for what comes
        if candidate is None or victim is None:
            leaving = candidate or victim
        elif self._sketch.count(candidate) > self._sketch.count(victim):
            del self._window[candidate]
            self._probation[candidate] = None
            leaving = victim
        else:
            leaving = candidate
        if leaving is not None:
            self.remove(leaving)
        return leaving

    def remove(self, key: bytes) -> None:
        for part in (self._window, self._probation, self._protected):
            if key in part:
                del part[key]
                return
        raise KeyError(key)
