"""Lane: a queue of what shall be done on the drive, and the I/O threads that work through it."""

from __future__ import annotations

import time
from collections import deque
from threading import Thread
from typing import TYPE_CHECKING

from kvortex.bell import Bell

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from threading import Event

    from kvortex.disk.slots import Status

    Row = tuple[int, int, int, int, float]
    """Job, position, part, parts, and a second of the clock; see Moves."""
    Order = Callable[[int, int, float], bool]
    Work = Callable[[Row], Status]
    Answers = deque[tuple["Lane", Row, Status]]

WAITING = 4096
"""Rows that may be under way for each thread."""


class Lane:
    """Has rows worked through in order by whichever thread is free, and answers each with a status.

    All but the work itself is called by one thread, which never waits here. It counts an answer off
    `under_way` when it takes it. A deque needs no lock, neither where rows are taken nor where
    answers of several lanes meet.

    Args:
        name: of the threads.
        threads: how many; with one, rows are also ended in order.
        work: called in a thread; takes a row, returns its status and raises nothing.
        answers: gets lane, row and status.
        answered: rung after each answer.
        closing: set, ends each thread after the row it works on; `wake` them then.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        work: Work,
        answers: Answers,
        answered: Bell,
        closing: Event,
    ) -> None:
        self.under_way = 0
        self._todo: deque[Row] = deque()
        self._work = work
        self._called = Bell()
        self._answers = answers
        self._answered = answered
        self._closing = closing
        self._threads = [
            Thread(target=self._run, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def push(self, rows: Sequence[Row]) -> int:
        """Hand over leading rows while there is room; returns how many."""
        count = min(len(rows), WAITING * len(self._threads) - self.under_way)
        self._todo.extend(rows[:count])
        self.under_way += count
        if count:
            self._called.ring()
        return count

    def order(self, what: int, position: int, until: float) -> bool:
        """Push a row that belongs to no job; returns whether there was room."""
        return self.push([(what, position, 0, 1, until)]) == 1

    def wake(self) -> None:
        """Have the threads look what they shall do."""
        self._called.ring()

    def join(self, timeout: float) -> bool:
        """Wait for the threads, after `closing` was set; returns whether all ended."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        """Each thread that finds more than it can do wakes the next one."""
        while not self._closing.is_set():
            self._called.wait()
            while self._todo and not self._closing.is_set():
                try:
                    row = self._todo.popleft()
                except IndexError:
                    break  # another thread was faster
                if self._todo:
                    self._called.ring()
                self._answers.append((self, row, self._work(row)))
                self._answered.ring()
        self._called.ring()
