"""DiskStore: what is written is read, also by the next store; what fails is told and hurts none."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from disks import (
    KINDS,
    Faults,
    all_ended,
    block_bytes,
    checksum,
    content,
    ended,
    fill,
    opened,
    read,
    seal,
    verified_by,
    written,
)

import kvortex.disk.breaker
import kvortex.disk.health
import kvortex.disk.lane
import kvortex.disk.moves
import kvortex.disk.slots
import kvortex.disk.store
from kvortex.checksum import UNCOUNTED
from kvortex.core import ConfigError
from kvortex.disk import disk_slots_in_pool
from kvortex.disk.file import DiskFile

if TYPE_CHECKING:
    from pathlib import Path

KEYS = [b"first", b"second", b"third" * 12]
SLOTS = dict(zip(KEYS, (0, 5, 3), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot_bytes", [1, 100, 4096, 8192, 600_001, 1 << 20, (1 << 20) + 4096])
def test_what_was_written_is_read_by_this_store_and_the_next(
    tmp_path: Path, slot_bytes: int, kind: str
) -> None:
    expected = [block_bytes(key, slot_bytes=slot_bytes) for key in KEYS]
    how = verified_by(kind, slot_bytes)
    with opened(tmp_path, slot_bytes=slot_bytes, verification=how, readers=4) as (store, pool):
        assert store.direct
        assert written(store, pool, SLOTS, verification=how) == frozenset()
        assert read(store, pool, KEYS, list(SLOTS.values()), how) == expected
    with opened(tmp_path, slot_bytes=slot_bytes, verification=how, readers=4) as (store, pool):
        found = dict(zip(store.survivors.keys, store.survivors.slots.tolist(), strict=True))
        assert found == SLOTS
        assert store.survivors.generations.tolist() == [1, 2, 3]
        assert [read(store, pool, [key], [SLOTS[key]], how)[0] for key in KEYS] == expected
        assert store.counters.read_blocks == 3
        assert store.counters.read_bytes == 3 * slot_bytes


@pytest.mark.parametrize("slot_bytes", [8192, 2 << 20])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_checksum_beside_a_slot_travels_as_it_is(
    kind: str, slot_bytes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody counts it anew on the way out; on the way back the CPU compares its own."""
    how = verified_by(kind, slot_bytes)
    assert how is not None
    data = block_bytes(b"a", slot_bytes=slot_bytes)
    right, wrong = checksum(how, b"a", data), -5
    with opened(tmp_path, slot_bytes=slot_bytes, verification=how, readers=8) as (store, pool):
        fill(pool, 1, data)
        for number, beside in ((1, right), (2, wrong)):
            pool.checksums[1] = beside
            store.write(number, [b"a"], [1], [number])
            assert ended(store, number) == frozenset()
        for parts in (1, 2, 4)[: store._pieces]:
            store._most_parts = parts
            pool.bytes[3].fill_(0xEE)
            pool.running_checksums[:, 3] = 99
            store.read(3, [b"a"], [1], [3])
            assert ended(store, 3) == frozenset()
            assert content(pool, 3) == data
            assert pool.running_checksums[:, 3].tolist() == [UNCOUNTED, UNCOUNTED, right]
        pool.checksums[3] = 0
        store.read(4, [b"a"], [2], [3])
        assert ended(store, 4) == (frozenset() if how.by_gpu else {0})
        assert ("other bytes than were written" in caplog.text) is not how.by_gpu
        assert pool.checksums[3] == (wrong if how.by_gpu else 0)
        assert store.counters.corrupt_blocks == (not how.by_gpu)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_right_bytes_of_another_key_are_wrong(kind: str, tmp_path: Path) -> None:
    how = verified_by(kind)
    with opened(tmp_path, verification=how) as (store, pool):
        written(store, pool, {b"a": 0}, verification=how)
        seal(pool, 0, b"b", how)
        store.write(2, [b"a"], [0], [1])
        assert ended(store, 2) == frozenset()
        assert read(store, pool, [b"a", b"a"], [0, 1], how) == [block_bytes(b"a"), None]


def test_a_cache_is_of_one_kind_of_checksums(tmp_path: Path) -> None:
    """Those of another layout count as another kind; whoever comes back finds his own."""
    ways = [*map(verified_by, KINDS), verified_by("the CPU", fingerprint=1)]
    for n, how in enumerate(ways):
        with opened(tmp_path, verification=how) as (store, pool):
            assert store.survivors.keys == []
            assert store.survivors.invalid == 0
            assert not written(store, pool, {b"key": n}, verification=how)
    for n, how in enumerate(ways):
        with opened(tmp_path, verification=how) as (store, pool):
            assert store.survivors.slots.tolist() == [n]
            assert read(store, pool, [b"key"], [n], how) == [block_bytes(b"key")]


def test_how_many_loads_are_compared_makes_no_other_cache(tmp_path: Path) -> None:
    how = verified_by("the GPU")
    assert how is not None
    with opened(tmp_path, verification=how) as (store, pool):
        assert not written(store, pool, {b"key": 3}, verification=how)
    with opened(tmp_path, verification=replace(how, mode="sampled")) as (store, _):
        assert store.survivors.keys == [b"key"]
    with opened(tmp_path, verification=replace(how, mode="off")) as (store, pool):
        assert store.survivors.keys == []
        assert not written(store, pool, {b"key": 3})
    with opened(tmp_path) as (store, _):  # the disk's own, as without any
        assert store.survivors.keys == [b"key"]


def test_a_block_is_read_into_its_slot_and_no_other(tmp_path: Path) -> None:
    with opened(tmp_path) as (store, pool):
        written(store, pool, SLOTS)
        pool.bytes.fill_(7)
        store.read(9, [KEYS[1]], [5], [2])
        assert ended(store, 9) == frozenset()
        assert content(pool, 2) == block_bytes(KEYS[1])
        assert all(pool.bytes[slot].eq(7).all() for slot in range(8) if slot != 2)


def test_a_slot_that_is_written_again_holds_the_new_bytes(tmp_path: Path) -> None:
    with opened(tmp_path) as (store, pool):
        written(store, pool, SLOTS)
        written(store, pool, {b"other": 5})
        assert read(store, pool, [b"other", KEYS[1]], [5, 5]) == [block_bytes(b"other"), None]
        assert store.counters.stale_blocks == 1


class Logged(DiskFile):
    """Notes which file each write is to; may tear the records that it is given."""

    log: ClassVar[list[str]] = []
    tears = False

    def write(self, memory: memoryview | bytes, offset: int) -> None:
        self.log.append(self.name)
        if self.tears and self.name == "records" and any(memory):
            super().write(memory[:64], offset)
            raise OSError(errno.EIO, "torn")
        super().write(memory, offset)


def test_what_may_be_the_record_of_a_slot_is_away_before_its_bytes_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writes(slot: int) -> list[str]:
        """That it takes to write one block."""
        Logged.log.clear()
        written(store, pool, {b"key %d" % slot: slot})
        return Logged.log.copy()

    first, again = ["slots", "records"], ["records", "slots", "records"]
    with opened(tmp_path, open_file=Logged) as (store, pool):
        assert [writes(slot) for slot in (0, 0, 1, 1, 2)] == [first, again, first, again, first]
        store.erase([1])
        while store._erasures._erasing:
            store.wait(0.01)
            store.poll()
        assert [writes(slot) for slot in (1, 1)] == [first, again]
        monkeypatch.setattr(Logged, "tears", True)
        assert writes(3) == first
        monkeypatch.setattr(Logged, "tears", False)
        assert writes(3) == again
        store.clear()  # from memory at once, from the disk later
        assert writes(0)[-3:] == again
    (records,) = tmp_path.glob("*/rank-0/records")
    with records.open("r+b") as file:
        file.seek(2 * 128)
        file.write(b"no record")
    with opened(tmp_path, open_file=Logged) as (store, pool):
        assert [writes(slot) for slot in (2, 4)] == [again, first]
        store._files.let_go()
        store._files.reopen(store._cache._folder.fd)  # where others may have written meanwhile
        assert writes(5) == again


def test_of_two_slots_with_one_key_the_newer_survives(tmp_path: Path) -> None:
    with opened(tmp_path) as (store, pool):
        written(store, pool, {b"key": 6}, version=1)
        written(store, pool, {b"key": 2}, version=2)
    with opened(tmp_path) as (store, pool):
        assert store.survivors.slots.tolist() == [2]
        assert store.survivors.stale.tolist() == [6]
        assert read(store, pool, [b"key", b"key"], [2, 6]) == [block_bytes(b"key", 2), None]
    with opened(tmp_path) as (store, _):
        assert len(store.survivors.stale) == 0


def test_what_is_erased_is_gone_for_good(tmp_path: Path) -> None:
    with opened(tmp_path) as (store, pool):
        written(store, pool, SLOTS)
        store.erase([0, 3, 3])
        assert read(store, pool, KEYS, list(SLOTS.values())) == [None, block_bytes(KEYS[1]), None]
        written(store, pool, {b"other": 3})
    with opened(tmp_path) as (store, _):
        assert store.survivors.keys == [KEYS[1], b"other"]


def test_clear_forgets_also_what_is_being_written_and_not_what_comes_after(tmp_path: Path) -> None:
    faults = Faults(delay=0.01)
    with opened(tmp_path, open_file=faults.open_file, writers=1) as (store, pool):
        written(store, pool, SLOTS)
        store.write(7, [b"a", b"b"], [1, 2], [1, 2])
        store.clear()
        written(store, pool, {b"c": 1})
        assert read(store, pool, [b"a", b"b", b"c"], [1, 2, 1]) == [None, None, block_bytes(b"c")]
    with opened(tmp_path) as (store, _):  # for which c may have been computed with other weights
        assert store.survivors.keys == []
        assert store.survivors.invalid <= 1


@pytest.mark.parametrize("mended", [True, False])
def test_clear_is_one_order_which_is_carried_out_once_the_drive_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mended: bool
) -> None:
    monkeypatch.setattr(kvortex.disk.breaker, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(kvortex.disk.slots, "WIPED_BYTES", 3 * 128)
    faults = Faults()
    with opened(tmp_path, open_file=faults.open_file) as (store, pool):
        written(store, pool, SLOTS)
        faults.error = errno.EIO
        store.clear()
        store.poll()
        assert sum(lane.under_way for lane in store._lanes.all) == 1
        assert read(store, pool, KEYS, list(SLOTS.values())) == [None] * 3
        assert store.counters.read_errors == 0  # nothing was looked for
        faults.error = None
        deadline = time.monotonic() + 10
        while mended and (store._erasures._to_wipe or store._erasures._wiping):
            assert time.monotonic() < deadline
            store.wait(0.01)
            store.poll()
    with opened(tmp_path) as (store, _):  # else when the store closed
        assert store.survivors.keys == []
        assert store.survivors.invalid == 0


def test_a_larger_pool_keeps_what_there_is_and_a_smaller_one_its_beginning(tmp_path: Path) -> None:
    with opened(tmp_path, 4) as (store, pool):
        written(store, pool, {b"a": 0, b"b": 3})
    with opened(tmp_path, 9) as (store, pool):
        assert store.survivors.keys == [b"a", b"b"]
        written(store, pool, {b"c": 8})
    with opened(tmp_path, 2) as (store, pool):
        assert store.survivors.keys == [b"a"]
    with opened(tmp_path, 9) as (store, pool):
        assert store.survivors.keys == [b"a"]
        assert read(store, pool, [b"a"], [0]) == [block_bytes(b"a")]


def test_moves_may_be_short(tmp_path: Path) -> None:
    faults = Faults(short=True)
    with opened(tmp_path, open_file=faults.open_file, slot_bytes=1 << 16) as (store, pool):
        assert written(store, pool, SLOTS) == frozenset()
        there = read(store, pool, KEYS, list(SLOTS.values()))
        assert there == [block_bytes(key, slot_bytes=1 << 16) for key in KEYS]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.ENODEV])
def test_a_failed_write_is_not_kept_and_a_failed_read_is_a_miss(tmp_path: Path, code: int) -> None:
    faults = Faults()
    with opened(tmp_path, open_file=faults.open_file) as (store, pool):
        written(store, pool, SLOTS)
        faults.error = code
        assert written(store, pool, {b"other": 5}) == {0}
        assert read(store, pool, KEYS[:1], [0]) == [None]
        assert (store.counters.write_errors, store.counters.read_errors) == (1, 1)
        faults.error = None
        assert read(store, pool, KEYS, list(SLOTS.values()))[::2] == [
            block_bytes(KEYS[0]),
            block_bytes(KEYS[2]),
        ]
    with opened(tmp_path) as (store, pool):
        expected = {block_bytes(KEYS[1])} if KEYS[1] in store.survivors.keys else set()
        assert set(read(store, pool, [b"other", KEYS[1]], [5, 5])) <= {None} | expected


def test_a_drive_that_keeps_failing_is_left_alone_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kvortex.disk.breaker, "FIRST_PAUSE_S", 0.8)
    faults = Faults()
    with opened(tmp_path, open_file=faults.open_file) as (store, pool):
        written(store, pool, {b"a": 0})
        faults.error, faults.writes_only = errno.EROFS, True
        for slot in range(1, 8):
            assert written(store, pool, {b"b": slot}) == {0}
        assert store.counters.write_errors == 3
        assert store.counters.refused_blocks == 4
        assert store.counters.times_off == 1
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert "Read-only file system" in caplog.text
        assert read(store, pool, [b"a"], [0]) == [block_bytes(b"a")]  # reading goes on
        faults.error = None
        deadline = time.monotonic() + 10
        while written(store, pool, {b"b": 1}):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert read(store, pool, [b"b"], [1]) == [block_bytes(b"b")]
        assert len(caplog.records) == 2


def test_no_request_is_put_at_risk_to_see_whether_the_drive_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvortex.disk.breaker, "FIRST_PAUSE_S", 0.05)
    faults = Faults()
    with opened(tmp_path, open_file=faults.open_file) as (store, pool):
        written(store, pool, SLOTS)
        faults.error = errno.EIO
        for slot in (1, 2, 4):
            written(store, pool, {b"x": slot})
            read(store, pool, [KEYS[0]], [0])
        told = store.poll()
        assert (told.reading_off, told.writing_off) == (True, True)
        before, refused = faults.moves, store.counters.refused_blocks
        while faults.moves < before + 4:  # it is tried without being asked for anything
            told = store.poll()
            store.wait(0.01)
        assert (told.reading_off, told.writing_off) == (True, True)
        faults.error = None
        while told.reading_off or told.writing_off:
            told = store.poll()
            store.wait(0.01)
        assert read(store, pool, KEYS, list(SLOTS.values())) == [block_bytes(k) for k in KEYS]
        assert store.counters.refused_blocks == refused
    with opened(tmp_path) as (store, _):  # nor was anything hurt by trying
        assert set(store.survivors.keys) >= set(KEYS)


@pytest.mark.parametrize("what", ["whole", "cut off", "of another life", "gone"])
def test_a_folder_that_went_away_is_used_again_if_it_comes_back_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """In place of a mount, which tests/test_disk_mounts.py takes away for those who may."""
    monkeypatch.setattr(kvortex.disk.breaker, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(kvortex.disk.breaker, "LONGEST_PAUSE_S", 0.1)
    faults, disk, away = Faults(), tmp_path / "disk", tmp_path / "away"
    with opened(disk, open_file=faults.open_file) as (store, pool):
        written(store, pool, SLOTS)
        faults.error = errno.EIO
        for slot in (1, 2, 4):
            written(store, pool, {b"x": slot})
            read(store, pool, [KEYS[0]], [0])
        disk.rename(away)
        faults.error = None
        if what != "gone":
            shutil.copytree(away, disk)
            (folder,) = disk.glob("*/rank-0")
            if what == "cut off":
                os.truncate(folder / "slots", 4096)
            if what == "of another life":
                about = (folder / "namespace.json").read_text()
                (folder / "namespace.json").write_text(about.replace('"life": "', '"life": "x'))
        deadline = time.monotonic() + (10 if what == "whole" else 0.5)
        while (told := store.poll()).reading_off or told.writing_off:
            store.wait(0.01)
            if time.monotonic() > deadline:
                break
        assert (told.reading_off or told.writing_off) is (what != "whole")
        if what == "whole":
            assert read(store, pool, KEYS, list(SLOTS.values())) == [block_bytes(k) for k in KEYS]
            assert not written(store, pool, {b"new": 6})
    if what == "whole":
        with opened(disk) as (store, _):
            assert set(store.survivors.keys) >= {*KEYS, b"new"}
    else:
        assert disk.exists() is (what != "gone")


@pytest.mark.parametrize("what", ["disk", "records", "slots"])
def test_a_folder_that_is_removed_is_noticed_without_an_error_and_used_again_if_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """Files that are open are written and read as well when they are deleted."""
    monkeypatch.setattr(kvortex.disk.health, "LOOK_S", 0.02)
    monkeypatch.setattr(kvortex.disk.breaker, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(kvortex.disk.breaker, "LONGEST_PAUSE_S", 0.1)
    disk, away, deadline = tmp_path / "disk", tmp_path / "away", time.monotonic() + 20

    def until(off: bool) -> None:
        while (told := store.poll()).reading_off is not off or told.writing_off is not off:
            assert time.monotonic() < deadline
            store.wait(0.01)

    with opened(disk) as (store, pool):
        written(store, pool, SLOTS)
        for _ in range(10):
            store.poll()
            time.sleep(0.01)
        assert (store.poll().reading_off, caplog.records) == (False, [])
        place = disk if what == "disk" else next(disk.rglob(what))
        place.rename(away)
        until(off=True)
        assert f"not those at {disk}" in caplog.text
        assert len(caplog.records) == 1
        assert store.counters.times_off == 2
        for _ in range(20):
            store.poll()
            time.sleep(0.01)
        assert not place.exists()
        away.rename(place)
        until(off=False)
        assert read(store, pool, KEYS, list(SLOTS.values())) == [block_bytes(k) for k in KEYS]
        assert not written(store, pool, {b"new": 6})
    with opened(disk) as (store, _):
        assert set(store.survivors.keys) == {*KEYS, b"new"}


def test_why_a_drive_stays_off_is_told_when_it_is_another_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kvortex.disk.breaker, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(kvortex.disk.breaker, "LONGEST_PAUSE_S", 0.05)
    faults, disk = Faults(writes_only=True), tmp_path / "disk"
    told: list[list[str]] = []

    def tried(times: int) -> None:
        """Until it has been so often in vain."""
        for _ in range(times):
            before = store._health.writing._next_trial
            while store._health.writing._next_trial == before:
                store.poll()
                store.wait(0.01)
        told.append([record.getMessage() for record in caplog.records])
        caplog.clear()

    with opened(disk, open_file=faults.open_file) as (store, pool):
        faults.error = errno.EIO
        for slot in (1, 2, 4):
            written(store, pool, {b"x": slot})
        tried(3)
        faults.error = errno.ENOSPC
        tried(4)
        disk.rename(tmp_path / "away")
        tried(4)
    off, full, gone = told
    assert len(off) == 1
    assert "(Input/output error); blocks" in off[0]
    assert full == [f"Disk cache: writing to {disk} is still off (No space left on device)."]
    assert gone == [f"Disk cache: writing to {disk} is still off (No such file or directory)."]


class Numberless(DiskFile):
    """On a file system that numbers a file anew each time somebody looks."""

    @property
    def inode(self) -> tuple[int, int]:
        return 0, 0


def test_where_files_cannot_be_told_apart_nobody_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvortex.disk.health, "LOOK_S", 0.0)
    with opened(tmp_path, open_file=Numberless) as (store, pool):
        for version in range(20):
            assert not written(store, pool, SLOTS, version)
        assert not store.poll().writing_off


def test_a_trial_that_takes_too_long_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvortex.disk.breaker, "FIRST_PAUSE_S", 0.05)
    faults = Faults()
    with opened(tmp_path, open_file=faults.open_file, read_deadline_s=0.1) as (store, pool):
        written(store, pool, SLOTS)
        faults.error = errno.EIO
        for _ in range(3):
            read(store, pool, [KEYS[0]], [0])
        faults.error, faults.delay, before = None, 0.2, faults.moves
        while faults.moves == before or store._health.reading._on_trial:
            assert store.poll().reading_off
            store.wait(0.01)
        faults.delay = 0
        while store.poll().reading_off:
            store.wait(0.01)


def test_the_pause_doubles_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvortex.disk.breaker, "LONGEST_PAUSE_S", 5.0)
    breaker, now, pauses = kvortex.disk.breaker.Breaker("this"), 0.0, []
    for _ in range(3):
        breaker.fail(now, "broken")
    for _ in range(5):
        start = now
        while not breaker.wants_trial(now):
            now += 0.25
        pauses.append(now - start)
        assert not breaker.wants_trial(now + 100)  # one at a time
        breaker.fail(now, "broken")  # of a use from before
        assert not breaker.wants_trial(now + 100)
        breaker.end_trial(now, well=False)
    assert pauses == [1, 2, 4, 5, 5]
    breaker.succeed()
    assert breaker.is_off
    assert breaker.wants_trial(now + 5)
    breaker.end_trial(now + 5, well=True)
    assert not breaker.is_off


def test_a_drive_that_works_for_a_moment_only_is_tried_more_and_more_seldom() -> None:
    breaker, now, pauses = kvortex.disk.breaker.Breaker("this"), 1000.0, []
    for stays in (0.1, 0.1, 0.1, 9.0, 0.1):
        for _ in range(3):
            breaker.fail(now, "full")
        start = now
        while not breaker.wants_trial(now):
            now += 0.25
        pauses.append(now - start)
        breaker.end_trial(now, well=True)
        now += stays
    assert pauses == [1, 2, 4, 8, 1]


def test_nobody_waits_for_a_drive_that_stalls(tmp_path: Path) -> None:
    faults = Faults()
    with opened(tmp_path, open_file=faults.open_file, read_deadline_s=0.3) as (store, pool):
        written(store, pool, SLOTS)
        faults.delay, start = 1.0, time.monotonic()
        store.read(4, KEYS, [0, 5, 3], [0, 1, 2])
        store.read(5, [KEYS[0]], [0], [3])
        fill(pool, 4, block_bytes(b"other"))
        store.write(6, [b"other"], [4], [4])
        while store._health.reading._errors < 2:
            store.poll()
            time.sleep(0.01)
        assert 0.3 < time.monotonic() - start < 1  # by then two reads count as failed
        failed = all_ended(store, 4, 5, 6)
        assert 2 in failed[4]  # what waited behind the stall was not even tried
        assert failed[5] == {0}
        assert failed[6] == frozenset()
        assert store.counters.slow_blocks >= 2
        faults.delay = 0
        assert read(store, pool, KEYS[:1], [0]) == [block_bytes(KEYS[0])]


@pytest.mark.parametrize("reads", [True, False])
def test_a_drive_that_hangs_goes_off_while_it_hangs_with_one_job_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reads: bool
) -> None:
    """A small pool has no more, and the next one is planned when this one has ended."""
    for module in (kvortex.disk.store, kvortex.disk.moves, kvortex.disk.health):
        monkeypatch.setattr(module, "WRITE_PATIENCE_S", 0.2)
    monkeypatch.setattr(kvortex.disk.health, "LEAST_PATIENCE_S", 0.1)
    monkeypatch.setattr(kvortex.disk.breaker, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(kvortex.disk.breaker, "LONGEST_PAUSE_S", 0.1)
    faults = Faults()
    with opened(
        tmp_path, open_file=faults.open_file, read_deadline_s=0.2, readers=1, writers=1
    ) as (store, pool):
        written(store, pool, SLOTS)
        faults.flows.clear()
        try:
            start = time.monotonic()
            (store.read if reads else store.write)(4, KEYS[:2], [0, 5], [0, 5])
            while not ((told := store.poll()).reading_off or told.writing_off):
                assert time.monotonic() < start + 10
                store.wait(0.01)
            assert time.monotonic() > start + 0.6
            assert (told.reading_off, told.writing_off) == (reads, not reads)
            assert told.ended == {}
            assert (store.counters.slow_blocks, store.counters.times_off) == (2, 1)
            (record,) = caplog.records
            assert "it does not answer in time" in record.getMessage()
        finally:
            faults.flows.set()
        assert ended(store, 4) == {1}  # which was not tried any more
        assert store.counters.slow_blocks == 2  # it was counted before
        assert store.counters.write_errors == store.counters.read_errors == 0
        while (told := store.poll()).reading_off or told.writing_off:
            assert time.monotonic() < start + 20
            store.wait(0.01)
        assert read(store, pool, KEYS[:1], [0]) == [block_bytes(KEYS[0])]


def test_a_write_that_waited_too_long_gives_its_host_slot_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvortex.disk.moves, "WRITE_PATIENCE_S", 0.3)
    faults = Faults(delay=0.15)
    with opened(tmp_path, open_file=faults.open_file, writers=1) as (store, _):
        store.write(1, [b"a", b"b"], [0, 1], [0, 1])
        assert ended(store, 1) == {1}


def test_a_block_of_which_a_part_is_refused_ends_with_its_other_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvortex.disk.lane, "WAITING", 1)
    faults = Faults()
    with opened(tmp_path, 2, slot_bytes=1 << 20, open_file=faults.open_file, readers=3) as (s, p):
        written(s, p, {b"a": 0})
        faults.delay, before = 0.3, faults.moves
        s.read(7, [b"a"], [0], [0])  # a part in each of two lanes
        s.read(8, [b"a"], [0], [1])  # one in the third lane, one in none
        while faults.moves < before + 3:
            time.sleep(0.001)
        assert s.poll().ended == {}  # its host slot is in use
        assert all_ended(s, 7, 8) == {7: frozenset(), 8: {0}}


def test_slots_that_another_rank_may_have_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as (store, pool):
        assert written(store, pool, {b"a": 7}) == frozenset()
        store.write(3, [b"b"] * 3, [0, 8, -1], [8, 0, 0])
        store.read(4, [b"a"] * 3, [7, 8, 7], [8, 0, -1])
        assert all_ended(store, 3, 4) == {3: {0, 1, 2}, 4: {0, 1, 2}}
        assert store.counters.refused_blocks == 6
        store.erase([8, -1])
        assert read(store, pool, [b"a"], [7]) == [block_bytes(b"a")]


def test_what_a_drive_answers_after_the_end_is_not_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kvortex.disk.store, "CLOSE_S", 0.01)
    faults = Faults()
    with opened(tmp_path, open_file=faults.open_file) as (store, pool):
        written(store, pool, {b"a": 0})
        faults.delay, before = 0.2, faults.moves
        store.read(3, [b"a"], [0], [1])
        while faults.moves == before:
            time.sleep(0.001)
        store.close()
        assert "has not answered" in caplog.text
        assert store.poll().ended == {3: {0}}
        for lane in store._lanes.all:
            assert lane.join(10)
        assert store.poll().ended == {}
        store._cache.close()  # which close() left to the drive


def test_a_full_queue_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvortex.disk.lane, "WAITING", 3)
    faults = Faults(delay=0.02)
    with opened(tmp_path, open_file=faults.open_file, writers=1, readers=1) as (store, _):
        slots = list(range(8))
        store.write(1, [b"%d" % slot for slot in slots], slots, slots)
        failed = ended(store, 1)
        assert failed == {3, 4, 5, 6, 7}
        assert store.counters.refused_blocks == 5
        store.erase(slots)  # which is never refused, only later
        deadline = time.monotonic() + 10
        while store._erasures._unerased and time.monotonic() < deadline:
            store.poll()
            time.sleep(0.01)
    with opened(tmp_path) as (store, _):
        assert store.survivors.keys == []


def test_writes_keep_to_their_pace(tmp_path: Path) -> None:
    speed = 8192 * 40
    with opened(tmp_path, 128, max_write_bytes_per_s=speed) as (store, _):
        slots = list(range(100))
        start = time.monotonic()
        store.write(1, [b"%d" % slot for slot in slots], slots, slots)
        assert ended(store, 1) == frozenset()
        assert time.monotonic() - start > 99 / 40 - 1  # a second's worth may come at once
        store.write(2, [b"%d" % slot for slot in slots], slots, slots)
        store.write(3, [b"x"] * 100, slots, slots)
        assert store.poll().ended == {3: frozenset(slots)}


def test_an_unlimited_store_has_no_pace(tmp_path: Path) -> None:
    with opened(tmp_path, 64) as (store, _):
        slots = list(range(64))
        store.write(1, [b"%d" % slot for slot in slots], slots, slots)
        assert ended(store, 1) == frozenset()


def test_every_job_ends_when_the_store_closes(tmp_path: Path) -> None:
    faults = Faults(delay=0.05)
    with opened(tmp_path, open_file=faults.open_file, writers=1, readers=1) as (store, _):
        slots = list(range(8))
        store.write(1, [b"%d" % slot for slot in slots], slots, slots)
        store.read(2, [b"1"] * 8, slots, slots)
        while faults.moves < 2:
            time.sleep(0.001)
        store.close()
        store.close()
        report = store.poll()
        assert set(report.ended) == {1, 2}
        assert 7 in report.ended[1]
        store.write(3, [b"late"], [0], [0])
        store.read(4, [b"late"], [0], [0])
        assert store.poll().ended == {3: {0}, 4: {0}}


def test_what_was_to_be_erased_or_replaced_is_erased_when_the_store_closes(tmp_path: Path) -> None:
    faults = Faults()
    with opened(tmp_path, open_file=faults.open_file, writers=1) as (store, pool):
        written(store, pool, SLOTS | {b"kept": 6})
        faults.delay, before = 0.1, faults.moves
        store.write(5, [b"x", b"y"], [1, 5], [1, 5])
        store.erase([0])
        while faults.moves == before:  # then the lane is at the first block
            time.sleep(0.001)
    with opened(tmp_path) as (store, _):
        assert set(store.survivors.keys) == {b"x", KEYS[2], b"kept"}


def test_an_empty_job_ends(tmp_path: Path) -> None:
    with opened(tmp_path) as (store, _):
        store.write(1, [], [], [])
        store.read(2, [], [], [])
        assert store.poll().ended == {1: frozenset(), 2: frozenset()}


def test_nothing_raises_out_of_a_thread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path) as (store, pool):
        store.write(1, [b"k" * 65], [0], [-1])  # a key and a slot that cannot be
        assert ended(store, 1) == {0}
        store.write(1, ["no bytes"], [0], [0])  # type: ignore[list-item]
        assert ended(store, 1) == {0}
        assert written(store, pool, SLOTS) == frozenset()
        assert "could not be moved" in caplog.text


class Plain(DiskFile):
    """On a file system without O_DIRECT and fallocate."""

    def _bypass_cache(self) -> bool:
        return False

    def allocate(self, size: int) -> bool:
        super().allocate(size)
        return False


def test_lesser_file_systems_do_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path, open_file=Plain, slot_bytes=5000) as (store, pool):
        assert not store.direct
        assert written(store, pool, SLOTS) == frozenset()
        there = read(store, pool, KEYS, list(SLOTS.values()))
        assert there == [block_bytes(key, slot_bytes=5000) for key in KEYS]
    (record,) = caplog.records
    assert "no O_DIRECT and no fallocate" in record.getMessage()


def test_slots_fit_the_pool() -> None:
    assert disk_slots_in_pool(1, 2 << 20) == 512
    assert disk_slots_in_pool(1, (2 << 20) - 5) == 512
    assert disk_slots_in_pool(1, 2 << 20, num_ranks=3) == 170
    with pytest.raises(ConfigError, match=r"disk_pool_gb=0\.001: one KV block takes .* at least"):
        disk_slots_in_pool(0.001, 2 << 20)


def test_keys_in_a_full_table_are_found_fast(tmp_path: Path) -> None:
    """100 GB of 2 MiB slots are 51 200 records; bench_disk measures the whole opening."""
    from kvortex.disk.format import Record, RecordFormat

    packed: Any = bytearray()
    record_format = RecordFormat(bytes(16), 0, 4096)
    for slot in range(51_200):
        packed += record_format.pack(slot, Record(b"%064d" % slot, slot, 1, 2))
    start = time.perf_counter()
    found = record_format.read_table(memoryview(packed))
    assert time.perf_counter() - start < 1
    assert len(found.keys) == 51_200
    assert found.invalid == 0
