"""Adaptive admission: of new blocks, the leading ones that a pool can keep until they return."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .admission import SEEN_SHARE, AdmissionFilter
from .contest import Contest
from .ghosts import COUNT, SPREAD, Ghosts
from .reuse import ReuseDistance

if TYPE_CHECKING:
    from .admission import Place

POSITIONS = 512
"""Blocks further into a request are counted as if they were here."""
AGAIN = -1
"""Stands for the position of a block that was asked for before."""
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
TURN_SHARE, TURN_BITS = 8, 5
"""Seldom is: in one of 32 turns, each of the capacity divided by TURN_SHARE accesses. Which one
follows no period, for requests may have the same."""


class Adaptive(AdmissionFilter):
    """A block asked for again is stored. Of a request's new blocks the first few are: all of them
    where the pool is large against the traffic, none (second sight) where it is small.

    The border follows from three things that are counted: how long keys take to return, how many
    new blocks come at each position in the meantime, and how many come again. Leading blocks come
    first because a block is of no use without those before it.

    Whether that reckoning is right is put to the test all the time: four miniature pools, over a
    sample of the keys, try it and three other rules. While one of those has clearly more hits than
    the reckoning it is in force. One stores everything, one nothing that is new, and one hardly
    anything: where more prompts take turns than the pool can hold, each new one would drive out
    another shortly before its turn, and a part of them that stays is worth more. The last is given
    up as soon as the pool has fewer hits by it than the reckoning would have.

    The last block of a request is treated apart: where requests end inside of a block, it does not
    return with the next turn, and is not stored once that was seen.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._reuse = ReuseDistance(capacity)
        self._seen = Ghosts(SEEN_SHARE * capacity)
        """Key to whether it was the last of its request."""
        self._border = POSITIONS
        """How many leading blocks fit, as was reckoned."""
        self._contest = Contest(capacity)
        self._new = [0.0] * POSITIONS
        self._again = 0.0
        self._since = 0.0
        self._last_seen = self._last_again = 0.0

    def hit(self, key: bytes) -> None:
        self._reuse.access(key)
        if key in self._contest.sample:
            self._contest.access(key, self._stored(AGAIN), hit=True)

    def admit(self, key: bytes, place: Place) -> bool:
        self._reuse.access(key)
        if self._reuse.now - self._since > max(LEAST_PERIOD, self.capacity // PERIOD_SHARE):
            self._decide()
        was_last = self._seen.pop(key)
        position = min(place.position, POSITIONS - 1) if was_last is None else AGAIN
        if key in self._contest.sample:
            self._contest.access(key, self._stored(position), hit=False)
        if was_last is None:
            return self._admit_new(key, place, position)
        self._again += 1
        self._last_again += was_last
        stored = self._stored(position)[self._contest.in_force]
        if not stored:
            self._seen.put(key, was_last)
        return stored

    def _admit_new(self, key: bytes, place: Place, position: int) -> bool:
        last = place.position == place.length - 1 > 0
        self._seen.put(key, last)
        self._last_seen += last
        if last and self._last_does_not_return():
            return False
        self._new[position] += 1
        return self._stored(position)[self._contest.in_force]

    def _stored(self, position: int) -> tuple[bool, ...]:
        """By each rule, in their order, whether a block is stored that is not there."""
        if position == AGAIN:
            return self._is_turn(), True, True, True
        return False, False, position < self._border, True

    def _is_turn(self) -> bool:
        turn = int(self._reuse.now * TURN_SHARE // max(1, self.capacity))
        return (turn * SPREAD & COUNT) >> (32 - TURN_BITS) == 0

    def _last_does_not_return(self) -> bool:
        """Seldom against what comes again of all new blocks."""
        if self._last_seen < LAST_SAMPLE:
            return False
        usual = self._again / (sum(self._new) + self._last_seen)
        return self._last_again / self._last_seen < usual / 4

    def _decide(self) -> None:
        """Reckon anew, and see who is ahead; older counts weigh half at each decision."""
        span = self._reuse.now - self._since
        self._border = self._fitting(span)
        self._contest.decide()
        self._new = [new / 2 for new in self._new]
        self._again /= 2
        self._last_seen /= 2
        self._last_again /= 2
        self._since = self._reuse.now - span / 2

    def _fitting(self, span: float) -> int:
        """How many leading blocks the pool can keep, by what came in the last `span` accesses."""
        fits = SHARE_FOR_THE_NEW * self.capacity / self._reuse.typical
        room = fits * span - TIMES_KEPT * self._again
        for position, new in enumerate(self._new):
            room -= new
            if room < 0:
                return position
        return POSITIONS
