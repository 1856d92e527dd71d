"""Lanes: all that work on one drive, and where their answers meet. Owned by a store's thread."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from kvortex.bell import Bell
from kvortex.disk.lane import Lane

if TYPE_CHECKING:
    from collections.abc import Iterator
    from threading import Event

    from kvortex.disk.lane import Answers, Row
    from kvortex.disk.moves import Moves
    from kvortex.disk.slots import Status


class Lanes:
    """One that reads, by as many threads as `readers`, and `writers` of one thread each.

    Args:
        moves: what they do.
        closing: set, ends them after the row that each thread works on; see `end`.
    """

    def __init__(self, moves: Moves, readers: int, writers: int, closing: Event) -> None:
        self._answers: Answers = deque()
        self.answered = Bell()
        shared = (self._answers, self.answered, closing)
        self.reader = Lane("kvortex-disk-read", readers, moves.read, *shared)
        self._writers = [
            Lane(f"kvortex-disk-write-{number}", 1, moves.write, *shared)
            for number in range(writers)
        ]
        self.all = (self.reader, *self._writers)
        self.orders = (self.reader.order, self._writers[0].order)
        """Have the lane that reads, or the one that changes slot 0, take a row that is no job's."""

    def writer(self, slot: int) -> Lane:
        """All that changes a slot is done by one lane, in order."""
        return self._writers[slot % len(self._writers)]

    def order_change(self, what: int, slot: int) -> bool:
        """Of a slot; returns whether its lane had room."""
        return self.writer(slot).order(what, slot, 0.0)

    def take(self) -> Iterator[tuple[Row, Status]]:
        """What was answered so far."""
        for _ in range(len(self._answers)):
            lane, row, status = self._answers.popleft()
            lane.under_way -= 1
            yield row, status

    def end(self, timeout: float) -> bool:
        """Wait for all threads, after `closing` was set; returns whether they ended."""
        for lane in self.all:
            lane.wake()
        deadline = time.monotonic() + timeout
        return all(lane.join(max(0.0, deadline - time.monotonic())) for lane in self.all)
