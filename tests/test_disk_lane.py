"""Lane: rows in order, by whichever thread is free; none sleeps while there is something to do.

And Lanes: several of them, whose answers meet.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import contextmanager
from threading import Barrier, Event
from typing import TYPE_CHECKING, cast

import pytest

import kvortex.disk.lane
from kvortex.bell import Bell
from kvortex.disk.lane import Lane
from kvortex.disk.lanes import Lanes
from kvortex.disk.moves import ERASE
from kvortex.disk.slots import Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvortex.disk.lane import Answers, Row, Work
    from kvortex.disk.moves import Moves

TIMEOUT = 20


def rows(*positions: int) -> list[Row]:
    return [(1, position, 0, 1, 0.0) for position in positions]


class Owner:
    """Of one lane; takes its answers."""

    def __init__(self, threads: int, work: Work) -> None:
        self.answers: Answers = deque()
        self.answered, self.closing = Bell(), Event()
        self.lane = Lane("lane", threads, work, self.answers, self.answered, self.closing)

    def take(self, count: int) -> list[int]:
        """Positions of the next answers, in the order in which they came."""
        while len(self.answers) < count:
            assert self.answered.wait(TIMEOUT)
        taken = [self.answers.popleft() for _ in range(count)]
        assert all(lane is self.lane and status is Status.DONE for lane, _, status in taken)
        self.lane.under_way -= count
        return [row[1] for _, row, _ in taken]


@contextmanager
def owner(threads: int, work: Work) -> Iterator[Owner]:
    found = Owner(threads, work)
    try:
        yield found
    finally:
        found.closing.set()
        found.lane.wake()
        assert found.lane.join(TIMEOUT)  # also those that sleep


def test_one_thread_ends_rows_in_order() -> None:
    with owner(1, lambda row: Status.DONE) as one:
        for start in range(0, 300, 3):
            assert one.lane.push(rows(start, start + 1, start + 2)) == 3
        assert one.take(300) == list(range(300))


@pytest.mark.parametrize("at_once", [True, False])
def test_as_many_threads_work_as_there_are_rows(at_once: bool) -> None:
    """However the rows come, also when all threads were asleep."""
    together = Barrier(4)

    def work(row: Row) -> Status:
        together.wait(TIMEOUT)
        return Status.DONE

    with owner(4, work) as one:
        for _ in range(50):
            for some in [rows(0, 1, 2, 3)] if at_once else [rows(n) for n in range(4)]:
                one.lane.push(some)
            assert sorted(one.take(4)) == [0, 1, 2, 3]


def test_a_row_that_takes_long_holds_up_no_other() -> None:
    flows = Event()

    def work(row: Row) -> Status:
        if row[1] == 0:
            assert flows.wait(TIMEOUT)
        return Status.DONE

    with owner(2, work) as one:
        one.lane.push(rows(*range(100)))
        assert one.take(99) == list(range(1, 100))
        flows.set()
        assert one.take(1) == [0]


def test_what_finds_no_room_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvortex.disk.lane, "WAITING", 2)
    flows = Event()

    def work(row: Row) -> Status:
        assert flows.wait(TIMEOUT)
        return Status.DONE

    with owner(2, work) as one:
        assert one.lane.push(rows(0, 1, 2)) == 3
        assert one.lane.push(rows(3, 4, 5)) == 1
        assert one.lane.push(rows(6)) == 0
        flows.set()
        assert sorted(one.take(4)) == [0, 1, 2, 3]
        assert one.lane.push(rows(7)) == 1
        assert one.take(1) == [7]


def test_threads_end_after_the_row_that_each_works_on() -> None:
    begun, flows = Barrier(3), Event()

    def work(row: Row) -> Status:
        begun.wait(TIMEOUT)
        assert flows.wait(TIMEOUT)
        return Status.DONE

    with owner(2, work) as one:
        one.lane.push(rows(0, 1, 2, 3))
        begun.wait(TIMEOUT)
        one.closing.set()
        one.lane.wake()
        assert not one.lane.join(0.01)
        flows.set()
        assert one.lane.join(TIMEOUT)
        assert sorted(one.take(2)) == [0, 1]
        assert not one.answers


class Slow:
    """Moves that hang until told otherwise."""

    def __init__(self) -> None:
        self.flows = Event()
        self.changed: list[int] = []

    def read(self, row: Row) -> Status:
        assert self.flows.wait(TIMEOUT)
        return Status.DONE

    def write(self, row: Row) -> Status:
        assert self.flows.wait(TIMEOUT)
        self.changed.append(row[1])
        return Status.ERROR


def test_all_that_changes_a_slot_is_done_in_order_and_answered_to_its_lane() -> None:
    moves, closing = Slow(), Event()
    lanes = Lanes(cast("Moves", moves), 2, 3, closing)
    assert len(lanes.all) == 4
    assert lanes.writer(1) is lanes.writer(4) is not lanes.writer(2)
    for slot in (1, 4, 1, 7):
        assert lanes.order_change(ERASE, slot)
    read, change_first = lanes.orders
    assert read(ERASE, 9, 0.0)
    assert [lane.under_way for lane in lanes.all] == [1, 0, 4, 0]
    assert change_first(ERASE, 0, 0.0)
    assert [lane.under_way for lane in lanes.all] == [1, 1, 4, 0]
    assert list(lanes.take()) == []
    moves.flows.set()
    taken: list[tuple[Row, Status]] = []
    while len(taken) < 6:
        assert lanes.answered.wait(TIMEOUT)
        taken += lanes.take()
    assert [slot for slot in moves.changed if slot] == [1, 4, 1, 7]
    assert sorted(row[1] for row, _ in taken) == [0, 1, 1, 4, 7, 9]
    assert {row[1] for row, status in taken if status is Status.DONE} == {9}
    assert not any(lane.under_way for lane in lanes.all)
    closing.set()
    assert lanes.end(TIMEOUT)


def test_whoever_ends_lanes_is_told_whether_one_hangs() -> None:
    moves, closing = Slow(), Event()
    lanes = Lanes(cast("Moves", moves), 1, 2, closing)
    lanes.order_change(ERASE, 1)
    while lanes.writer(1)._todo:
        time.sleep(0.001)
    closing.set()
    assert not lanes.end(0.01)
    moves.flows.set()
    assert lanes.end(TIMEOUT)
