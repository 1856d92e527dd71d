"""Lane: an I/O thread, with a ring of what it shall do and one of what it has done."""

from __future__ import annotations

from threading import Thread
from typing import TYPE_CHECKING

from kvortex.bell import Bell
from kvortex.spsc import SpscRing

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Event

    from kvortex.spsc import Records

WAITING = 4096
"""Rows that may be under way in one lane."""


class Lane:
    """Works through rows of numbers in order, one at a time, and answers each with a status.

    All but the work itself is called by one thread, which never waits here.

    Args:
        name: of the thread.
        width: numbers in a row; the first `width - 1` of an answer are those of the row, the last
            is the status.
        work: called in the thread; takes a row, returns its status and raises nothing.
        answered: rung after each answer.
        closing: set, ends the thread after the row it works on; `wake` it then.
    """

    def __init__(
        self,
        name: str,
        width: int,
        work: Callable[[list[int]], int],
        answered: Bell,
        closing: Event,
    ) -> None:
        self.under_way = 0
        self._todo = SpscRing(WAITING, width)
        self._done = SpscRing(WAITING, width)
        self._work = work
        self._called = Bell()
        self._answered = answered
        self._closing = closing
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def push(self, rows: Records) -> int:
        """Hand over leading rows while there is room, also for the answers; returns how many."""
        count = self._todo.push(rows[: WAITING - self.under_way])
        self.under_way += count
        if count:
            self._called.ring()
        return count

    def answers(self) -> list[list[int]]:
        """Rows that were worked on since the last call, the last number of each replaced."""
        if not self.under_way or not len(self._done):  # a step asks all lanes
            return []
        rows: list[list[int]] = self._done.pop(WAITING).tolist()
        self.under_way -= len(rows)
        return rows

    def wake(self) -> None:
        """Have the thread look what it shall do."""
        self._called.ring()

    def join(self, timeout: float) -> bool:
        """Wait for the thread, after `closing` was set; returns whether it ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._called.wait()
            while len(self._todo) and not self._closing.is_set():
                row = self._todo.pop(1)
                row[0, -1] = self._work(row[0].tolist())
                self._done.push(row)
                self._answered.ring()
