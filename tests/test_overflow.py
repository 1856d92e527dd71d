"""Overflow: what was on disk before, what a reset leaves of it, and when all is done."""

from __future__ import annotations

import time

import pytest
from overflows import PLACE, Setting, name

import kvortex.overflow
from kvortex.core import DiskPlan, DiskReport
from kvortex.metrics import MissReason
from kvortex.overflow import ADOPT_S
from kvortex.policies import LRU


def test_nothing_is_written_before_it_is_known_what_is_on_disk() -> None:
    setting = Setting(known=False).stored(b"new", b"old")
    assert setting.overflow.take_plan() is None
    setting.survived(b"old")
    (move,) = setting.plan().writes
    assert move.keys == (b"new",)
    assert move.disk_slots.tolist() != [0]
    assert setting.counters.disk_survivors == 1


def test_a_use_is_counted_once() -> None:
    class Counted(LRU):
        hits = 0

        def hit(self, key: bytes) -> None:
            Counted.hits += 1
            super().hit(key)

    setting = Setting()
    setting.disk._policy._policy = Counted(64)
    setting.survived(b"a", b"b")
    fetch = setting.fetch("r", b"a", b"b")
    setting.end(*setting.plan().reads)
    assert fetch.arrived == 2
    setting.overflow.touch([b"a", b"b"])  # as the request is scheduled
    setting.overflow.write_behind.consider(b"a", PLACE)  # as its block is stored anew
    assert Counted.hits == 2


def test_a_move_ends_when_it_has_on_every_rank() -> None:
    setting = Setting(64, num_ranks=2).stored(b"a", b"b")
    (move,) = setting.plan().writes
    setting.overflow.settle(DiskReport({move.id: 1}, {move.id: frozenset({0})}))
    assert setting.disk.lookup(b"b") is None
    setting.overflow.settle(DiskReport({move.id: 1}))
    assert setting.disk.lookup(b"a") is None
    assert setting.disk.lookup(b"b") is not None
    setting.check()


def test_a_reset_forgets_what_is_on_disk_under_way_and_waiting() -> None:
    setting = Setting(16).survived(b"a", b"b").stored(b"c", b"d", b"e")
    (write,) = setting.plan().writes
    fetch = setting.fetch("r", b"a", b"b")
    (read,) = setting.plan().reads
    setting.host.clear()
    setting.overflow.reset()
    assert setting.overflow.fetches.of("r") is None
    plan = setting.plan()
    assert plan.clear
    assert not plan.writes
    assert not setting.plan().clear
    setting.end(write, read)
    for key in (b"a", b"b", b"c", b"d", b"e"):
        assert key not in setting.overflow.readable
    assert not fetch.held
    assert setting.counters.disk_failed_reads == setting.counters.disk_failed_writes == 0
    setting.check()


def test_after_a_reset_a_key_is_read_anew() -> None:
    """Though a read of its old bytes is under way."""
    setting = Setting(32).survived(b"a")
    setting.fetch("old", b"a")
    (old,) = setting.plan().reads
    setting.host.clear()
    setting.overflow.reset()
    setting.stored(b"a")
    (write,) = setting.plan().writes
    assert write.disk_slots.tolist() != old.disk_slots.tolist()  # which is being read
    setting.end(write)
    setting.host.clear()
    fetch = setting.fetch("new", b"a")
    (new,) = setting.plan().reads
    setting.end(old)
    assert b"a" not in setting.host.readable
    setting.end(new)
    assert fetch.arrived == 1
    setting.overflow.fetches.release("new")
    setting.check()


def test_what_is_heard_of_only_after_a_reset_is_forgotten_too() -> None:
    setting = Setting(known=False)
    setting.overflow.reset()
    assert setting.plan().clear
    setting.survived(b"a")
    assert b"a" not in setting.overflow.readable
    assert setting.counters.disk_survivors == 0
    (move,) = setting.stored(b"b").plan().writes
    setting.end(move)
    setting.check()


def test_what_nobody_will_ask_for_is_cleared() -> None:
    setting = Setting(known=False)
    setting.overflow.disown()
    assert setting.plan() == DiskPlan(clear=True)
    setting.survived(b"a")
    assert b"a" not in setting.overflow.readable
    (move,) = setting.stored(b"b").plan().writes
    setting.end(move)
    assert b"b" in setting.disk.readable


def test_survivors_past_the_end_or_twice_are_not_adopted() -> None:
    setting = Setting(disk_slots=4, known=False)
    setting.overflow.settle(DiskReport(survivors={b"a": 1, b"past": 4}, num_slots=3))
    setting.overflow.settle(DiskReport(survivors={b"b": 1}))
    assert setting.disk.index.num_slots == 3
    assert b"a" in setting.disk.readable
    assert b"past" not in setting.disk.readable
    setting.disk.index.check()


def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survived is taken in two blocks at a time."""
    monkeypatch.setattr("kvortex.overflow.ADOPT_S", -1.0)
    monkeypatch.setattr("kvortex.index.BATCH", 2)


def test_many_survivors_are_taken_in_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written meanwhile, as a slot that looks free may hold one of them."""
    slowly(monkeypatch)
    keys = [name(number) for number in range(11)]
    setting = Setting(known=False).stored(b"new").survived(*keys)
    steps = 0
    while not setting.overflow.known:
        assert setting.overflow.pending
        assert setting.overflow.why_not_fetched(keys[-1]) is MissReason.LATE
        plan = setting.overflow.take_plan()
        assert plan is None or setting.overflow.known
        steps += 1
        assert steps < 20
    assert steps > 5
    assert plan is not None
    assert [block.slot for block in setting.disk.index] == list(range(11))
    assert setting.counters.disk_survivors == 11
    setting.end(*plan.writes)
    assert b"new" in setting.disk.readable
    setting.check()


@pytest.mark.parametrize("steps", range(9))
def test_a_reset_ends_what_is_being_taken_in(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    slowly(monkeypatch)
    setting = Setting(known=False).survived(*map(name, range(11)))
    for _ in range(steps):
        setting.overflow.take_plan()
    setting.overflow.reset()
    assert setting.plan().clear
    assert setting.overflow.known
    assert setting.disk.index.free == 64
    assert setting.disk.index.resident == 0
    setting.check()


def test_no_step_waits_for_a_million_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of 100 GB with blocks of 128 KiB has 763 thousand; here are fewer."""
    monkeypatch.setattr("kvortex.overflow.ADOPT_S", ADOPT_S)
    count = 100_000
    setting = Setting(disk_slots=count, known=False)
    survivors = {b"%032d" % slot: slot for slot in range(count)}
    spent = []
    start = time.thread_time()
    setting.overflow.settle(DiskReport(survivors=survivors))
    while not setting.overflow.known:
        spent.append(time.thread_time() - start)
        start = time.thread_time()
        setting.overflow.take_plan()
    assert sorted(spent)[len(spent) // 2] < 0.02
    assert setting.disk.index.resident == count


def test_an_idle_engine_does_not_wait_for_a_drive_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("kvortex.overflow.time.perf_counter", lambda: now)
    setting = Setting().stored(b"a", b"b", b"c")
    (move,) = setting.plan().writes
    now += kvortex.overflow.PATIENCE_S - 1
    assert setting.overflow.pending
    now += 2
    assert not setting.overflow.pending
    setting.end(move)
    assert setting.overflow.pending  # the third
    setting.end(*setting.plan().writes)
    setting.check()


def test_a_disk_that_is_off_is_neither_written_nor_waited_for() -> None:
    setting = Setting(64, num_ranks=2).survived(b"old").stored(b"a")
    news = DiskReport(counted={"write_errors": 3, "times_off": 2}, reading_off=1, writing_off=2)
    setting.overflow.settle(news)
    assert setting.counters.disk_write_errors == 3
    assert setting.counters.disk_times_off == 2
    assert setting.plan() == DiskPlan()  # which would have cost the block of a slot
    assert not setting.overflow.pending
    assert setting.overflow.why_not_fetched(b"old") is MissReason.FAILED
    setting.overflow.settle(DiskReport(reading_off=-1, writing_off=-1))
    assert setting.overflow.why_not_fetched(b"old") is MissReason.LATE
    assert not setting.plan().writes  # one rank's is off still
    setting.overflow.settle(DiskReport(writing_off=-1))
    (move,) = setting.plan().writes
    assert move.keys == (b"a",)
    setting.end(move)
    setting.check()


def test_what_is_distrusted_is_forgotten_and_its_record_erased() -> None:
    setting = Setting().survived(b"a", b"b")
    setting.overflow.distrust([b"a", b"never seen"])
    assert b"a" not in setting.overflow.readable
    assert setting.overflow.why_not_fetched(b"a") is None
    assert setting.overflow.pending  # an engine that is idle tells its workers yet
    assert setting.plan() == DiskPlan(erases=(0,))
    assert not setting.overflow.pending
    setting.overflow.distrust([b"a"])  # by the other rank
    assert setting.overflow.take_plan() is None
    assert b"b" in setting.disk.readable
    assert setting.counters.disk_distrusted_blocks == 1
    (move,) = setting.stored(b"a").plan().writes  # computed anew
    setting.end(move)
    assert b"a" in setting.disk.readable
    setting.check()


def test_what_is_being_written_is_distrusted_when_that_has_ended() -> None:
    setting = Setting(32, num_ranks=2).stored(b"a", b"b")
    (write,) = setting.plan().writes
    setting.overflow.distrust([b"b"])
    assert setting.plan() == DiskPlan()  # a slot that is written cannot be erased
    setting.end(write)
    assert (b"a" in setting.disk.readable, b"b" in setting.disk.readable) == (True, False)
    assert setting.plan() == DiskPlan(erases=(int(write.disk_slots[1]),))
    assert setting.counters.disk_distrusted_blocks == 1
    assert setting.counters.disk_failed_writes == 0
    setting.check()


def test_what_is_being_read_is_not_served_once_it_is_distrusted() -> None:
    setting = Setting(32).survived(b"a", b"b")
    fetch = setting.fetch("r", b"a", b"b")
    (read,) = setting.plan().reads
    setting.overflow.distrust([b"a"])
    assert setting.plan() == DiskPlan(erases=(0,))
    assert setting.disk.index.free == 62  # not to be written before the read has ended
    setting.end(read)
    assert (b"a" in setting.overflow.readable, fetch.arrived) == (False, 1)
    assert setting.disk.index.free == 63
    setting.overflow.fetches.release("r")
    setting.check()


def test_a_reset_erases_what_was_distrusted_with_all_else() -> None:
    setting = Setting().survived(b"a")
    setting.overflow.distrust([b"a"])
    setting.overflow.reset()
    assert setting.plan() == DiskPlan(clear=True)
    setting.check()


def test_ranks_agree_on_what_survived_and_disagree_on_nothing_else() -> None:
    one = DiskReport(
        {1: 1, 2: 1}, {1: frozenset({0})}, {1: frozenset({0})}, {b"a": 1, b"b": 2, b"c": 3}, 5
    )
    other = DiskReport(
        {1: 1}, {1: frozenset({2}), 3: frozenset({1})}, {}, {b"a": 1, b"b": 3, b"d": 4}, 4
    )
    both = DiskReport(
        {1: 2, 2: 1},
        {1: frozenset({0, 2}), 3: frozenset({1})},
        {1: frozenset({0})},
        {b"a": 1},
        4,
    )
    assert one.merge(other) == other.merge(one) == both
    assert one.merge(DiskReport()) == DiskReport().merge(one) == one
