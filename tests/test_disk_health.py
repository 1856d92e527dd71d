"""DriveHealth: what answers, late jobs, trials and looks say of a drive; without one."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kvortex.disk.health
from kvortex.disk.breaker import ERRORS_IN_A_ROW, FIRST_PAUSE_S
from kvortex.disk.health import LEAST_PATIENCE_S, LOOK_S, DriveHealth
from kvortex.disk.job import BlockRead, DiskJob
from kvortex.disk.moves import LOOK, TRIAL, WRITE_PATIENCE_S
from kvortex.disk.slots import Status

if TYPE_CHECKING:
    from kvortex.disk.lane import Order

READ_PATIENCE_S = 3.0
FOLDER = Path("/disk/namespace/rank-0")


class Drive:
    """Health of one that is not there, and what was ordered of its lanes."""

    def __init__(
        self, watched: Path | None = FOLDER, read_patience_s: float = READ_PATIENCE_S
    ) -> None:
        self.orders: list[tuple[str, int, int, float]] = []
        self.has_room = True
        self.why_off = ["cannot read", "cannot write"]
        lanes = (self.lane("read"), self.lane("write"))
        self.health = DriveHealth(Path("/disk"), watched, lanes, read_patience_s, self.why_off)

    def lane(self, name: str) -> Order:
        def order(what: int, position: int, until: float) -> bool:
            self.orders.append((name, what, position, until))
            return self.has_room

        return order

    @property
    def off(self) -> tuple[bool, bool]:
        """Reading, writing."""
        return self.health.reading.is_off, self.health.writing.is_off

    def ordered(self, now: float) -> list[tuple[str, int, int, float]]:
        """By a check at this second."""
        self.orders.clear()
        self.health.check(now)
        return self.orders.copy()

    def fail(self, *, reads: bool, times: int = ERRORS_IN_A_ROW) -> None:
        for _ in range(times):
            self.health.judge(job(reads=reads), Status.ERROR)


def job(*, reads: bool, blocks: int = 2, deadline: float = 0.0) -> DiskJob:
    """One that is with the lanes."""
    found = DiskJob(1, [b"key"] * blocks, [0] * blocks, [0] * blocks, deadline, parts=1)
    found.reads = [BlockRead.of(1)] * blocks if reads else []
    found.reason = "broken"
    return found


@pytest.mark.parametrize("reads", [True, False])
def test_errors_in_a_row_switch_off_that_way_only(
    reads: bool, caplog: pytest.LogCaptureFixture
) -> None:
    drive = Drive()
    drive.fail(reads=reads, times=ERRORS_IN_A_ROW - 1)
    drive.health.judge(job(reads=reads), Status.DONE)
    drive.fail(reads=reads, times=ERRORS_IN_A_ROW - 1)
    drive.health.judge(job(reads=not reads), Status.DONE)  # which proves nothing of this way
    assert drive.off == (False, False)
    drive.fail(reads=reads, times=1)
    assert drive.off == (reads, not reads)
    assert not drive.health.is_off
    (record,) = caplog.records
    assert "(broken)" in record.getMessage()


@pytest.mark.parametrize("status", [Status.CORRUPT, Status.STALE, Status.LATE, Status.REFUSED])
def test_what_is_not_the_drives_answer_says_nothing_of_it(status: Status) -> None:
    drive = Drive()
    drive.fail(reads=True, times=ERRORS_IN_A_ROW - 1)
    for _ in range(9):
        drive.health.judge(job(reads=True), status)
    assert drive.off == (False, False)
    drive.fail(reads=True, times=1)
    assert drive.off == (True, False)


@pytest.mark.parametrize(
    ("reads", "patience"), [(True, READ_PATIENCE_S), (False, WRITE_PATIENCE_S)]
)
def test_a_late_job_is_an_error_anew_after_each_patience_and_its_blocks_are_late_once(
    reads: bool, patience: float, caplog: pytest.LogCaptureFixture
) -> None:
    drive = Drive()
    late, in_time = job(reads=reads, deadline=100.0), job(reads=reads, deadline=1000.0)
    late.end(1, Status.DONE)
    found = []
    for now in (100.0, 100.1, 100.1 + patience, 100.2 + patience, 100.3 + 2 * patience):
        found.append(drive.health.judge_late([late, in_time], now))
        assert drive.off == (False, False) or now > 100.2 + patience
    assert found == [0, 1, 0, 0, 0]
    assert (late.slow, in_time.slow) == ({0}, set())
    assert drive.off == (reads, not reads)
    assert "it does not answer in time" in caplog.text


def test_a_short_stall_is_one_error_however_short_the_deadline() -> None:
    drive, late = Drive(read_patience_s=0.01), job(reads=True)
    for tenth in range(1, 10):
        drive.health.judge_late([late], tenth / 10 * LEAST_PATIENCE_S)
    assert drive.health.reading._errors == 1


@pytest.mark.parametrize("reads", [True, False])
def test_what_is_off_is_tried_by_its_own_lane_until_that_goes_well(
    reads: bool, caplog: pytest.LogCaptureFixture
) -> None:
    drive = Drive(watched=None)
    drive.fail(reads=reads)
    assert drive.ordered(time.monotonic()) == []
    now = time.monotonic() + FIRST_PAUSE_S
    patience = READ_PATIENCE_S if reads else WRITE_PATIENCE_S
    trial = ("read" if reads else "write", TRIAL, int(not reads), now + patience)
    assert drive.ordered(now) == [trial]
    assert drive.ordered(now + 1000) == []  # one at a time
    told = {Status.ERROR: drive.why_off[not reads], Status.LATE: "does not answer in time"}
    for status, why in told.items():
        caplog.clear()
        drive.health.settle(TRIAL, int(not reads), status)
        assert why in caplog.text
        assert drive.off == (reads, not reads)
        now += 1000
        assert len(drive.ordered(now)) == 1
    drive.health.settle(TRIAL, int(not reads), Status.DONE)
    assert drive.off == (False, False)
    assert drive.ordered(now + 1000) == []


def test_a_trial_for_which_there_is_no_room_has_failed() -> None:
    drive = Drive(watched=None)
    drive.fail(reads=True)
    drive.has_room, now = False, time.monotonic() + FIRST_PAUSE_S
    assert len(drive.ordered(now)) == 1
    drive.has_room = True
    assert drive.ordered(now + 1.9 * FIRST_PAUSE_S) == []
    assert len(drive.ordered(now + 2.1 * FIRST_PAUSE_S)) == 1


def test_files_are_looked_for_from_time_to_time_and_one_look_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drive, start = Drive(), time.monotonic()
    assert drive.ordered(start) == []
    drive.has_room = False
    look = [("read", LOOK, 0, 0.0)]
    assert drive.ordered(start + LOOK_S + 1) == look
    drive.has_room = True
    assert drive.ordered(start + LOOK_S + 1) == look  # for which there was no room
    assert drive.ordered(start + 9 * LOOK_S) == []
    monkeypatch.setattr(kvortex.disk.health, "LOOK_S", 1000.0)
    drive.health.settle(LOOK, 0, Status.DONE)
    assert drive.ordered(time.monotonic() + 990) == []
    assert drive.ordered(time.monotonic() + 1000) == look
    assert drive.off == (False, False)


def test_files_that_are_not_where_they_were_switch_off_both_ways_and_are_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    drive = Drive()
    drive.fail(reads=False)
    caplog.clear()
    for _ in range(2):  # the second one was ordered before
        drive.health.settle(LOOK, 0, Status.ERROR)
    assert drive.off == (True, True)
    assert (drive.health.reading.times_off, drive.health.writing.times_off) == (1, 1)
    (record,) = caplog.records
    assert f"not those at {FOLDER} any more" in record.getMessage()
    # What is off altogether is tried, which looks as well.
    assert {what for _, what, _, _ in drive.ordered(time.monotonic() + 1000)} == {TRIAL}


def test_where_files_cannot_be_told_apart_nobody_looks_for_them() -> None:
    assert Drive(watched=None).ordered(time.monotonic() + 1e9) == []


def test_of_corruption_the_first_is_told(caplog: pytest.LogCaptureFixture) -> None:
    drive = Drive()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            drive.health.tell_corrupt()
    assert len(caplog.records) == 1
    assert drive.off == (False, False)
