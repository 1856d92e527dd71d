"""DiskWorker: what it tells of its disk, and in which order a plan is carried out."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np
from disks import Faults, block_bytes, content, fill, opened

import kvortex.disk.breaker
from kvortex.core import DiskMove, DiskPlan, DiskReport
from kvortex.disk_worker import DiskWorker

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from kvortex.disk import DiskStore


def move(number: int, keys: list[bytes], slots: list[int], disk_slots: list[int]) -> DiskMove:
    return DiskMove(number, tuple(keys), np.array(slots), np.array(disk_slots))


def settled(worker: DiskWorker, store: DiskStore, *move_ids: int) -> DiskReport:
    """Reports until all of the moves have ended, as one."""
    report = DiskReport()
    while set(move_ids) - set(report.finished):
        assert store.wait(20)
        report = report.merge(worker.report() or DiskReport())
    return report


def test_survivors_and_size_are_told_once_the_oldest_first(tmp_path: Path) -> None:
    with opened(tmp_path, 4) as (store, _):
        worker = DiskWorker(store)
        assert worker.report() == DiskReport(survivors={}, num_slots=4)
        assert worker.report() is None
        worker.begin(DiskPlan(writes=(move(7, [b"b", b"a"], [0, 1], [3, 2]),)))
        assert settled(worker, store, 7) == DiskReport({7: 1})
        worker.begin(DiskPlan(writes=(move(8, [b"c"], [0], [0]),)))
        settled(worker, store, 8)
    with opened(tmp_path, 4) as (store, _):
        report = DiskWorker(store).report()
        assert report is not None
        assert report.survivors is not None
        assert list(report.survivors.items()) == [(b"b", 3), (b"a", 2), (b"c", 0)]


def test_what_failed_and_what_is_lost(tmp_path: Path) -> None:
    with opened(tmp_path, 4) as (store, _):
        worker = DiskWorker(store)
        worker.begin(DiskPlan(writes=(move(1, [b"a", b"b"], [0, 1], [0, 1]),)))
        settled(worker, store, 1)
        worker.begin(DiskPlan(reads=(move(2, [b"a", b"other", b"b"], [0, 1, 9], [0, 1, 1]),)))
        report = settled(worker, store, 2)
        assert report.failed == {2: frozenset({1, 2})}
        assert report.lost == {2: frozenset({1})}  # there is no host slot 9


def test_what_comes_too_late_is_not_lost(tmp_path: Path) -> None:
    faults = Faults()
    with opened(tmp_path, 4, open_file=faults.open_file, read_deadline_s=0.05, readers=1) as (
        store,
        _,
    ):
        worker = DiskWorker(store)
        worker.begin(DiskPlan(writes=(move(1, [b"a", b"b"], [0, 1], [0, 1]),)))
        settled(worker, store, 1)
        faults.delay = 0.2
        worker.begin(DiskPlan(reads=(move(2, [b"a", b"b"], [2, 3], [0, 1]),)))
        report = settled(worker, store, 2)
        assert report.failed == {2: frozenset({1})}
        assert report.lost == {}


def test_a_write_is_lost_by_the_drive_and_not_by_its_pace(tmp_path: Path) -> None:
    faults = Faults()
    with opened(tmp_path, 4, open_file=faults.open_file, max_write_bytes_per_s=1.0) as (store, _):
        worker = DiskWorker(store)
        faults.error = errno.ENOSPC
        worker.begin(DiskPlan(writes=(move(1, [b"a", b"b"], [0, 1], [0, 1]),)))
        report = settled(worker, store, 1)
        assert report.failed == {1: frozenset({0, 1})}
        assert report.lost == {1: frozenset({0})}
        assert report.counted == {"write_errors": 1, "refused_blocks": 1}


def test_what_the_ranks_counted_and_which_of_them_are_off_adds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvortex.disk.breaker, "FIRST_PAUSE_S", 0.05)
    faults = Faults()
    with opened(tmp_path, 4, open_file=faults.open_file) as (store, _):
        worker = DiskWorker(store)
        worker.begin(DiskPlan(writes=(move(1, [b"a"], [0], [0]),)))
        settled(worker, store, 1)
        faults.error = errno.EIO
        for number in (2, 3, 4):
            worker.begin(DiskPlan(reads=(move(number, [b"a"], [1], [0]),)))
        report = settled(worker, store, 2, 3, 4)
        assert report.counted == {"read_errors": 3, "times_off": 1}
        assert (report.reading_off, report.writing_off) == (1, 0)
        worker.begin(DiskPlan(reads=(move(5, [b"a"], [1], [0]),)))
        again = settled(worker, store, 5)
        assert again.counted == {"refused_blocks": 1}
        assert again.reading_off == 0  # no more of them
        other = DiskReport(counted={"read_errors": 2}, reading_off=1, writing_off=1)
        both = report.merge(other)
        assert both.counted == {"read_errors": 5, "times_off": 1}
        assert (both.reading_off, both.writing_off) == (2, 1)
        faults.error = None
        while not (back := worker.report()):
            store.wait(0.01)
        assert back == DiskReport(reading_off=-1)


def test_what_a_clear_forgets_is_not_what_comes_with_it(tmp_path: Path) -> None:
    with opened(tmp_path, 4) as (store, pool):
        worker = DiskWorker(store)
        for slot, key in enumerate((b"a", b"b")):
            fill(pool, slot, block_bytes(key))
        worker.begin(DiskPlan(writes=(move(1, [b"a", b"b"], [0, 1], [0, 1]),)))
        # The first write may still be under way.
        worker.begin(DiskPlan((move(2, [b"b"], [1], [1]),), (move(3, [b"a"], [2], [0]),), True))
        report = settled(worker, store, 1, 2, 3)
        assert report.failed == {3: frozenset({0})}
        worker.begin(DiskPlan(reads=(move(4, [b"b"], [3], [1]),)))
        assert settled(worker, store, 4).failed == {}
        assert content(pool, 3) == block_bytes(b"b")


def test_what_is_erased_is_gone_for_the_next_life_and_what_comes_with_it_is_not(
    tmp_path: Path,
) -> None:
    with opened(tmp_path, 4) as (store, _):
        worker = DiskWorker(store)
        worker.begin(DiskPlan(writes=(move(1, [b"a", b"b"], [0, 1], [0, 1]),)))
        settled(worker, store, 1)
        worker.begin(DiskPlan((move(2, [b"c"], [0], [0]),), erases=(0, 1)))
        worker.begin(DiskPlan(reads=(move(3, [b"b"], [2], [1]),)))
        assert settled(worker, store, 2, 3).failed == {3: frozenset({0})}
    with opened(tmp_path, 4) as (store, _):
        assert store.survivors.keys == [b"c"]


def test_what_is_written_after_a_reset_is_for_this_life_only(tmp_path: Path) -> None:
    """The weights may have been changed, and the next life begins with those of the files."""
    with opened(tmp_path, 4) as (store, _):
        worker = DiskWorker(store)
        worker.begin(DiskPlan(writes=(move(1, [b"a"], [0], [0]),)))
        settled(worker, store, 1)
        worker.begin(DiskPlan(writes=(move(2, [b"b"], [1], [1]),), clear=True))
        settled(worker, store, 2)
        worker.begin(DiskPlan(reads=(move(3, [b"b"], [2], [1]),)))
        assert settled(worker, store, 3).failed == {}
    with opened(tmp_path, 4) as (store, _):
        assert store.survivors.keys == []
