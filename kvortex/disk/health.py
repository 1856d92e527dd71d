"""DriveHealth: whether a drive is read and written, by what it answers. Owned by a store's thread.

It only looks at answers and gives orders; lanes carry them out.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, NamedTuple

from kvortex.disk.breaker import Breaker
from kvortex.disk.moves import LOOK, TRIAL, WRITE_PATIENCE_S
from kvortex.disk.slots import Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from kvortex.disk.job import DiskJob
    from kvortex.disk.lane import Order

logger = logging.getLogger(__name__)

LOOK_S = 5.0
"""Between two looks at whether the files are where they were."""
LEAST_PATIENCE_S = 1.0
"""Before a late job counts as another error: a short stall is one error, whatever the deadline."""
TOO_SLOW = "it does not answer in time"


class _Way(NamedTuple):
    """Reading, or writing."""

    breaker: Breaker
    order: Order
    patience_s: float


class DriveHealth:
    """`reading` and `writing` go off apart, after errors and late jobs of their own; both at once
    when the files that are open are not those of the folder any more.

    Args:
        disk_path: for the log.
        watched: the folder of the files; None where it cannot be told whether they are in it.
        orders: have the lane that reads, and the one that changes slot 0, take a row that is of no
            job; return whether there was room.
        read_patience_s: how long a read is worth waiting for.
        why_off: why the last trial of reading, and of writing, failed; set by lanes.
    """

    def __init__(
        self,
        disk_path: Path,
        watched: Path | None,
        orders: tuple[Order, Order],
        read_patience_s: float,
        why_off: Sequence[str],
    ) -> None:
        self.reading = Breaker(f"reading from {disk_path}")
        self.writing = Breaker(f"writing to {disk_path}")
        self._ways = (
            _Way(self.reading, orders[0], read_patience_s),
            _Way(self.writing, orders[1], WRITE_PATIENCE_S),
        )
        self._why_off = why_off
        self._watched = watched
        self._next_look = math.inf if watched is None else time.monotonic() + LOOK_S
        self._looking = False
        self._told_corrupt = False

    @property
    def is_off(self) -> bool:
        """Whether it is neither read nor written."""
        return self.reading.is_off and self.writing.is_off

    def judge(self, job: DiskJob, status: Status) -> None:
        """By how a part of a block ended."""
        if status is Status.DONE:
            self._way(job).breaker.succeed()
        elif status is Status.ERROR:
            self._way(job).breaker.fail(time.monotonic(), job.reason)

    def judge_late(self, jobs: Iterable[DiskJob], now: float) -> int:
        """A drive that lets a job wait past its deadline is failing. As few jobs may be under way,
        none of which ends, each counts again whenever another patience has passed.

        Returns how many blocks are late now that were not before.
        """
        newly = 0
        for job in jobs:
            if now <= job.deadline:
                continue
            way = self._way(job)
            job.deadline = now + max(way.patience_s, LEAST_PATIENCE_S)
            if not job.slow:
                job.slow = job.unended
                newly += len(job.slow)
            way.breaker.fail(now, TOO_SLOW)
        return newly

    def tell_corrupt(self) -> None:
        """Only the first time: nothing is off for it."""
        if not self._told_corrupt:
            self._told_corrupt = True
            logger.warning(
                "Disk cache: a block came back with other bytes than were written; it is computed "
                "again. See the drive's health. Later ones are only counted."
            )

    def check(self, now: float) -> None:
        """Order what is due: a look at what is on, trials of what is off."""
        if not self.is_off and not self._looking and now > self._next_look:
            self._looking = self._ways[0].order(LOOK, 0, 0.0)  # no use of the files would tell
        for number, (breaker, order, patience_s) in enumerate(self._ways):
            # At no request's expense.
            if breaker.wants_trial(now) and not order(TRIAL, number, now + patience_s):
                breaker.end_trial(now, well=False)

    def settle(self, what: int, position: int, status: Status) -> None:
        """Take in the answer to a LOOK or a TRIAL."""
        now, well = time.monotonic(), status is Status.DONE
        if what == LOOK:
            self._settle_look(now, there=well)
        else:
            why = TOO_SLOW if status is Status.LATE else self._why_off[position]
            self._ways[position].breaker.end_trial(now, well=well, reason=why)

    def _settle_look(self, now: float, *, there: bool) -> None:
        self._looking = False
        self._next_look = now + LOOK_S
        if there or self.is_off:
            return
        logger.warning(
            "Disk cache: the files that are open are not those at %s any more, as if that was "
            "removed; blocks are computed instead, and it is looked for from time to time.",
            self._watched,
        )
        self.reading.switch_off(now)
        self.writing.switch_off(now)

    def _way(self, job: DiskJob) -> _Way:
        return self._ways[not job.reads]
