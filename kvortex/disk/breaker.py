"""Breaker: takes a drive out of service after repeated errors, and has it tried again."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

ERRORS_IN_A_ROW = 3
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 300.0


class Breaker:
    """Off after some errors in a row, until a trial goes well; the pause before each trial is twice
    the last one, and the first again once it was on for as long as that.

    Both turns are logged: that it went off, and that it is back; in between, why it still is off
    where a trial failed for another reason than was told last. For use from one thread.

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
        self._back_since = float("-inf")
        self._told = ""
        """The reason that was logged last."""

    def wants_trial(self, now: float) -> bool:
        """Whether to try it at this second, and tell `end_trial` of it; one at a time."""
        if not self.is_off or self._on_trial or now < self._next_trial:
            return False
        self._on_trial = True
        return True

    def end_trial(self, now: float, *, well: bool, reason: str = "") -> None:
        """What became of a trial, and why it failed, if that is known."""
        self._on_trial = False
        if well:
            self.is_off = False
            self._errors = 0
            self._back_since = now
            logger.warning("Disk cache: %s works again.", self._what)
        else:
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
            self._next_trial = now + self._pause
            if reason and reason != self._told:
                self._told = reason
                logger.warning("Disk cache: %s is still off (%s).", self._what, reason)

    def succeed(self) -> None:
        """A use went well; while it is off that is one from before, and proves nothing."""
        self._errors = 0

    def fail(self, now: float, reason: str) -> None:
        """A use failed."""
        self._errors += 1
        if self.is_off or self._errors < ERRORS_IN_A_ROW:
            return
        self.switch_off(now)
        self._told = reason
        logger.warning(
            "Disk cache: %s is off after %d errors in a row (%s); blocks are computed instead, "
            "and it is tried again from time to time.",
            self._what,
            self._errors,
            reason,
        )

    def switch_off(self, now: float) -> None:
        """It cannot be used, as is known without a try, and told by whoever knows."""
        if self.is_off:
            return
        self.is_off = True
        self.times_off += 1
        self._told = ""
        lasted = now - self._back_since > self._pause
        self._pause = FIRST_PAUSE_S if lasted else min(2 * self._pause, LONGEST_PAUSE_S)
        self._next_trial = now + self._pause
