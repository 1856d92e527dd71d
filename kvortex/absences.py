"""Absences: why keys that a request asks for are nowhere to be read. Scheduler side."""

from __future__ import annotations

from kvortex.metrics import MissReason

LEAST_KEYS, MOST_KEYS = 1 << 14, 1 << 18
"""That are remembered at least; twice as many may be, of some 100 bytes each."""


class Absences:
    """Remembers of the last keys that left, or were not let in, why.

    What it has forgotten was never stored, as far as it knows. Each key that leaves costs a step of
    the engine one entry in a dict: the older half of them is dropped at once.
    """

    def __init__(self, num_slots: int) -> None:
        """`num_slots` are those of all tiers: keys are remembered for a turn of them."""
        self._count = max(LEAST_KEYS, min(MOST_KEYS, num_slots))
        self._young: dict[int, MissReason] = {}
        """By hash, as the keys themselves are longer: two that share one cost a wrong guess."""
        self._old: dict[int, MissReason] = {}

    def note(self, key: bytes, reason: MissReason) -> None:
        """A key is not readable any more, or will not be."""
        if len(self._young) >= self._count:
            self._old, self._young = self._young, {}
        self._young[hash(key)] = reason

    def why(self, key: bytes) -> MissReason:
        """The newest reason that was noted of a key which is not readable."""
        number = hash(key)
        return self._young.get(number) or self._old.get(number) or MissReason.NEVER_STORED

    def clear(self) -> None:
        """Everything was forgotten at once, for no reason of its own."""
        self._young, self._old = {}, {}
