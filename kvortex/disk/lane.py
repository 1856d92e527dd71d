"""Lane: an I/O thread, and a ring of what it shall do."""

from __future__ import annotations

from threading import Thread
from typing import TYPE_CHECKING

from kvortex.bell import Bell
from kvortex.spsc import SpscRing

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable
    from threading import Event

    from kvortex.disk.slots import Status
    from kvortex.spsc import Records

    Answers = deque[tuple["Lane", list[int], Status]]

WAITING = 4096
"""Rows that may be under way in one lane."""


class Lane:
    """Works through rows of numbers in order, one at a time, and answers each with a status.

    All but the work itself is called by one thread, which never waits here. It counts an answer off
    `under_way` when it takes it.

    Args:
        name: of the thread.
        width: numbers in a row.
        work: called in the thread; takes a row, returns its status and raises nothing.
        answers: gets the lane, the row and its status; one that lanes share costs nothing while
            there are none, and whoever appends needs no lock.
        answered: rung after each answer.
        closing: set, ends the thread after the row it works on; `wake` it then.
    """

    def __init__(
        self,
        name: str,
        width: int,
        work: Callable[[list[int]], Status],
        answers: Answers,
        answered: Bell,
        closing: Event,
    ) -> None:
        self.under_way = 0
        self._todo = SpscRing(WAITING, width)
        self._work = work
        self._called = Bell()
        self._answers = answers
        self._answered = answered
        self._closing = closing
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def push(self, rows: Records) -> int:
        """Hand over leading rows while fewer than WAITING are under way; returns how many."""
        count = self._todo.push(rows[: WAITING - self.under_way])
        self.under_way += count
        if count:
            self._called.ring()
        return count

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
            while rows := self._todo.pop(WAITING).tolist():
                for row in rows:
                    if self._closing.is_set():
                        return
                    self._answers.append((self, row, self._work(row)))
                    self._answered.ring()
