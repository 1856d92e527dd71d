"""Breaker: takes a drive out of service after repeated errors, and tries it again."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

ERRORS_IN_A_ROW = 3
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 300.0


class Breaker:
    """Off after some errors in a row; tried once after a pause, which doubles with each failure.

    Both turns are logged: that it went off, and that it is back. For use from one thread.

    Args:
        what: is switched, for the log: "reading from /disk".
    """

    def __init__(self, what: str) -> None:
        self.is_off = False
        self.times_off = 0
        self._what = what
        self._errors = 0
        self._pause = FIRST_PAUSE_S
        self._next_trial = 0.0
        self._on_trial = False

    def allows(self, now: float) -> bool:
        """Whether to use it at this second; while it is off, once after each pause."""
        if not self.is_off:
            return True
        if now < self._next_trial:
            return False
        self._on_trial = True
        self._next_trial = now + self._pause
        return True

    def succeed(self) -> None:
        """A use went well; one from before it went off proves nothing until there is a trial."""
        self._errors = 0
        if self._on_trial:
            self.is_off = self._on_trial = False
            self._pause = FIRST_PAUSE_S
            logger.warning("Disk cache: %s works again.", self._what)

    def fail(self, now: float, reason: str) -> None:
        """A use failed."""
        self._errors += 1
        if self._on_trial:
            self._on_trial = False
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
            self._next_trial = now + self._pause
        elif not self.is_off and self._errors >= ERRORS_IN_A_ROW:
            self.is_off = True
            self.times_off += 1
            self._next_trial = now + self._pause
            logger.warning(
                "Disk cache: %s is off after %d errors in a row (%s); blocks are computed instead, "
                "and it is tried again from time to time.",
                self._what,
                self._errors,
                reason,
            )
