"""Absences: why keys that a request asks for are nowhere to be read. Scheduler side."""

from __future__ import annotations

from kvortex.metrics import MissReason
from kvortex.policies.ghosts import Ghosts

LEAST_KEYS, MOST_KEYS = 1 << 16, 1 << 20
"""That are remembered, 24 bytes each: 16 million tokens in blocks of 16 take 25 MB."""
REASONS = tuple(MissReason)


class Absences:
    """Remembers of the last keys that left, or were not let in, why; exact but for chance.

    What it has forgotten was never stored, as far as it knows.
    """

    def __init__(self, num_slots: int) -> None:
        """`num_slots` are those of all tiers: a key is remembered for two turns of them."""
        self._count = max(LEAST_KEYS, min(MOST_KEYS, 2 * num_slots))
        self._ghosts = Ghosts(self._count)

    def note(self, key: bytes, reason: MissReason) -> None:
        """A key is not readable any more, or will not be."""
        self._ghosts.pop(key)
        self._ghosts.put(key, REASONS.index(reason))

    def why(self, key: bytes) -> MissReason:
        """The newest reason that was noted of a key which is not readable."""
        number = self._ghosts.pop(key)
        if number is None:
            return MissReason.NEVER_STORED
        self._ghosts.put(key, number)
        return REASONS[number]

    def clear(self) -> None:
        """Everything was forgotten at once, for no reason of its own."""
        self._ghosts = Ghosts(self._count)
