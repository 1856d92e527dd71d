"""Adaptive admission: of new blocks, the leading ones that a pool can keep until they return."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from .admission import SEEN_SHARE, AdmissionFilter
from .reuse import ReuseDistance

if TYPE_CHECKING:
    from .admission import Place

POSITIONS = 512
"""Blocks further into a request are counted as if they were here."""
SHARE_FOR_THE_NEW = 0.5
"""Of the pool: what blocks seen for the first time may take in the time they need to return."""
TIMES_KEPT = 2
"""What came again is kept about so many times as long. Both were found on a trace of conversations;
with a fifth more the hit rates are the same within 1 %."""
PERIOD_SHARE = 4
LEAST_PERIOD = 2000
"""Accesses between two decisions: the capacity divided by PERIOD_SHARE, or so many."""
LAST_SAMPLE = 32
"""Last blocks of requests that must have been seen before they are judged."""


class Adaptive(AdmissionFilter):
    """A block asked for again is always stored. Of a request's new blocks the first few are: all
    of them where the pool is large against the traffic, none (second sight) where it is small.

    The border follows from three things that are counted: how long keys take to return, how many
    new blocks come at each position in the meantime, and how many come again. Leading blocks come
    first because a block is of no use without those before it.

    The last block of a request is treated apart: where requests end inside of a block, it does not
    return with the next turn, and is not stored once that was seen.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._reuse = ReuseDistance(capacity)
        self._seen: OrderedDict[bytes, bool] = OrderedDict()
        """Key to whether it was the last of its request."""
        self._first = POSITIONS
        """How many leading blocks are stored at first sight."""
        self._new = [0.0] * POSITIONS
        self._again = 0.0
        self._since = 0.0
        self._last_seen = self._last_again = 0.0

    def hit(self, key: bytes) -> None:
        self._reuse.access(key)

    def admit(self, key: bytes, place: Place) -> bool:
        self._reuse.access(key)
        if self._reuse.now - self._since > max(LEAST_PERIOD, self.capacity // PERIOD_SHARE):
            self._decide()
        was_last = self._seen.pop(key, None)
        if was_last is not None:
            self._again += 1
            self._last_again += was_last
            return True
        return self._admit_new(key, place)

    def _admit_new(self, key: bytes, place: Place) -> bool:
        position = min(place.position, POSITIONS - 1)
        last = place.position == place.length - 1 > 0
        self._seen[key] = last
        if len(self._seen) > SEEN_SHARE * self.capacity:
            self._seen.popitem(last=False)
        self._last_seen += last
        if last and self._last_does_not_return():
            return False
        self._new[position] += 1
        return position < self._first

    def _last_does_not_return(self) -> bool:
        """Seldom against what comes again of all new blocks."""
        if self._last_seen < LAST_SAMPLE:
            return False
        usual = self._again / max(1.0, sum(self._new) + self._last_seen)
        return self._last_again / self._last_seen < usual / 4

    def _decide(self) -> None:
        """Choose the border from what came since; older counts weigh half at each decision."""
        span = self._reuse.now - self._since
        fits = SHARE_FOR_THE_NEW * self.capacity / self._reuse.typical
        room = fits * span - TIMES_KEPT * self._again
        self._first = 0
        for new in self._new:
            room -= new
            if room < 0:
                break
            self._first += 1
        self._new = [new / 2 for new in self._new]
        self._again /= 2
        self._last_seen /= 2
        self._last_again /= 2
        self._since = self._reuse.now - span / 2
