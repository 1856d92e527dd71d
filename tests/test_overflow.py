"""Overflow: what is written to disk and when, what is fetched, and what a reset leaves of it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import kvortex.overflow
from kvortex.core import DiskPlan, DiskReport
from kvortex.metrics import Counters
from kvortex.overflow import MOVE_BLOCKS, Overflow
from kvortex.policies import LRU, Place, SecondSight
from kvortex.tiers import HostTier

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from kvortex.core import DiskMove
    from kvortex.policies import AdmissionFilter

PLACE = Place()
BLOCK_BYTES = 1 << 20


def name(number: int) -> bytes:
    return b"key %d" % number


class Setting:
    """Both tiers and what moves between them, without workers: the test ends the moves."""

    def __init__(
        self,
        host_slots: int = 16,
        disk_slots: int = 64,
        *,
        num_ranks: int = 1,
        known: bool = True,
        admission: AdmissionFilter | None = None,
        speed: float | None = None,
    ) -> None:
        self.host = HostTier(host_slots, LRU(host_slots))
        self.disk = HostTier(disk_slots, LRU(disk_slots), admission)
        self.counters = Counters()
        self.overflow = Overflow(self.host, self.disk, self.counters, num_ranks, BLOCK_BYTES, speed)
        self._known = known

    def stored(self, *keys: bytes) -> Setting:
        """Blocks in the host that are to be written."""
        blocks = self.host.reserve(keys)
        assert len(blocks) == len(keys)
        self.host.commit(blocks)
        for key in keys:
            self.overflow.consider(key, PLACE)
        return self

    def survived(self, *keys: bytes) -> Setting:
        """Blocks of a former life."""
        self.overflow.settle(DiskReport(survivors={key: slot for slot, key in enumerate(keys)}))
        return self

    def plan(self) -> DiskPlan:
        """What the workers shall do; they have told of empty disks, unless of something else."""
        if self._known and not self.overflow.known:
            self.survived()
        return self.overflow.take_plan() or DiskPlan()

    def end(self, *moves: DiskMove, failed: Sequence[int] = (), lost: Sequence[int] = ()) -> None:
        """On every rank; of each move the same positions fail."""
        bad, gone = frozenset(failed), frozenset(lost)
        for move in moves:
            ranks = self.overflow._num_ranks
            self.overflow.settle(
                DiskReport({move.id: ranks}, {move.id: bad | gone}, {move.id: gone})
            )

    def fetch(self, request_id: str, *keys: bytes) -> kvortex.overflow.Fetch:
        return self.overflow.fetch(request_id, keys, [None] * len(keys))

    def check(self) -> None:
        """Nothing is held any more."""
        for tier in (self.host, self.disk):
            tier.index.check()
            assert tier.index.reserved == 0
            assert all(block.pins == 0 for block in tier.index)
        assert not self.overflow.pending
        assert self.overflow._room == self.overflow._most_held


def test_blocks_are_written_in_the_order_of_their_coming_and_few_at_once() -> None:
    keys = [name(number) for number in range(5)]
    setting = Setting(16).stored(*keys)
    order: list[bytes] = []
    while (plan := setting.plan()).writes:
        (move,) = plan.writes
        assert len(move.keys) <= 16 // 8
        assert not setting.plan().writes  # before these have ended
        assert all(setting.host.index.get(key).pins == 1 for key in move.keys)  # type: ignore[union-attr]
        order += move.keys
        setting.end(move)
    assert order == keys
    assert setting.counters.disk_written_blocks == 5
    assert setting.counters.disk_written_bytes == 5 * BLOCK_BYTES
    assert all(setting.disk.lookup(key) for key in keys)
    setting.check()


def test_no_more_is_on_its_way_than_may_be_written_in_a_second() -> None:
    setting = Setting(64, speed=3.5 * BLOCK_BYTES).stored(*map(name, range(8)))
    (move,) = setting.plan().writes
    assert len(move.keys) == 3
    setting = Setting(64, speed=1.0).stored(*map(name, range(8)))
    (move,) = setting.plan().writes
    assert len(move.keys) == 1


def test_nothing_is_written_before_it_is_known_what_is_on_disk() -> None:
    setting = Setting(known=False).stored(b"new", b"old")
    assert setting.overflow.take_plan() is None
    setting.survived(b"old")
    (move,) = setting.plan().writes
    assert move.keys == (b"new",)
    assert move.disk_slots.tolist() != [0]
    assert setting.counters.disk_survivors == 1


def test_a_block_that_is_only_arriving_goes_on_waiting() -> None:
    setting = Setting()
    blocks = setting.host.reserve([b"a"])
    setting.overflow.consider(b"a", PLACE)
    setting.stored(b"b")
    (move,) = setting.plan().writes
    assert move.keys == (b"b",)
    setting.host.commit(blocks)
    setting.end(move)
    (move,) = setting.plan().writes
    assert move.keys == (b"a",)


def test_what_leaves_before_its_turn_is_counted_and_not_remembered() -> None:
    setting = Setting(8, known=False)
    for number in range(100):
        setting.stored(name(number))
    assert setting.counters.disk_missed_writes == 92
    assert len(setting.overflow._waiting) == 8


def test_a_store_that_came_to_nothing_is_not_waited_for() -> None:
    setting = Setting()
    blocks = setting.host.reserve([b"a"])
    setting.overflow.consider(b"a", PLACE)
    setting.host.abort(blocks)
    assert setting.overflow.pending
    assert not setting.plan().writes
    assert setting.counters.disk_missed_writes == 1
    setting.check()


def test_a_disk_too_small_takes_what_it_can() -> None:
    setting = Setting(64, disk_slots=3).stored(*map(name, range(8)))
    (move,) = setting.plan().writes
    assert move.keys == (name(0), name(1), name(2))
    assert setting.counters.disk_missed_writes == 5
    setting.end(move)
    setting.check()


def test_only_what_is_worth_a_write_is_written() -> None:
    setting = Setting(disk_slots=2, admission=SecondSight(2)).survived(b"x", b"y").stored(b"a")
    assert not setting.plan().writes
    assert setting.counters.disk_not_admitted == 1
    setting.overflow.touch([b"a"])
    (move,) = setting.plan().writes
    assert move.keys == (b"a",)


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
    setting.overflow.consider(b"a", PLACE)  # as its block is stored anew
    assert Counted.hits == 2


def test_failed_writes_are_not_on_disk() -> None:
    setting = Setting(64).stored(b"a", b"b", b"c")
    (move,) = setting.plan().writes
    setting.end(move, failed=[1])
    assert [setting.disk.lookup(key) is not None for key in move.keys] == [True, False, True]
    assert setting.counters.disk_failed_writes == 1
    assert setting.counters.disk_written_blocks == 2
    setting.check()


def test_what_the_host_does_not_trust_any_more_does_not_come_to_disk() -> None:
    setting = Setting(64).stored(b"a", b"b")
    (move,) = setting.plan().writes
    block = setting.host.lookup(b"a")
    assert block is not None
    setting.host.forget([block])  # as after a load that failed
    setting.end(move)
    assert [key in setting.disk.readable for key in (b"a", b"b")] == [False, True]
    assert setting.counters.disk_failed_writes == 0
    setting.check()


def test_a_move_ends_when_it_has_on_every_rank() -> None:
    setting = Setting(64, num_ranks=2).stored(b"a", b"b")
    (move,) = setting.plan().writes
    setting.overflow.settle(DiskReport({move.id: 1}, {move.id: frozenset({0})}))
    assert setting.disk.lookup(b"b") is None
    setting.overflow.settle(DiskReport({move.id: 1}))
    assert setting.disk.lookup(b"a") is None
    assert setting.disk.lookup(b"b") is not None
    setting.check()


def test_a_fetch_brings_what_is_on_disk_and_holds_what_is_in_the_host() -> None:
    setting = Setting(8).survived(b"b", b"c").stored(b"a")
    for move in setting.plan().writes:
        setting.end(move)
    fetch = setting.fetch("r", b"a", b"b", b"c", b"nowhere")
    (move,) = setting.plan().reads
    assert move.keys == (b"b", b"c")
    assert fetch.under_way
    setting.end(move)
    assert not fetch.under_way
    assert not fetch.short
    assert fetch.arrived == 2
    assert setting.counters.disk_read_blocks == 2
    blocks = setting.host.reserve([name(number) for number in range(8)])
    assert len(blocks) == 5  # the three are held
    setting.host.abort(blocks)
    setting.overflow.release("r")
    setting.check()


def test_what_two_requests_need_is_read_once_and_held_until_both_have_it() -> None:
    setting = Setting(16).survived(b"a", b"b", b"c")
    one, other = setting.fetch("one", b"a", b"b"), setting.fetch("other", b"b", b"c")
    moves = setting.plan().reads
    assert [move.keys for move in moves] == [(b"a", b"b"), (b"c",)]
    setting.end(moves[1])
    assert one.under_way
    assert other.under_way
    setting.end(moves[0])
    assert not one.under_way
    assert not other.under_way
    assert (one.arrived, one.read) == (2, 2)
    assert (other.arrived, other.read) == (2, 1)
    assert setting.overflow._room == 16 // 2 - 3
    setting.overflow.release("one")
    block = setting.host.lookup(b"b")
    assert block is not None
    assert block.pins == 1
    setting.overflow.release("other")
    setting.check()


def test_who_waits_for_anothers_read_does_so_after_that_is_gone() -> None:
    setting = Setting().survived(b"a")
    setting.fetch("one", b"a")
    other = setting.fetch("other", b"a")
    setting.overflow.release("one")
    (move,) = setting.plan().reads
    assert other.under_way
    setting.end(move)
    assert other.arrived == 1
    assert list(other.held) == [b"a"]
    setting.overflow.release("other")
    setting.check()


def test_no_more_than_half_of_the_host_is_held_whoever_asks() -> None:
    keys = list(map(name, range(12)))
    setting = Setting(16).survived(*keys)
    first = setting.fetch("first", *keys[:6])
    second = setting.fetch("second", *keys[6:])
    moves = setting.plan().reads
    assert [len(move.keys) for move in moves] == [6, 2]
    assert setting.host.index.reserved == 8
    assert not first.short
    assert second.short
    setting.end(*moves)
    third = setting.fetch("third", *keys)
    assert third.short
    assert not third.under_way
    for request_id in ("first", "third"):
        setting.overflow.release(request_id)
    assert setting.fetch("second", *keys[6:]) is second
    (move,) = setting.plan().reads
    assert move.keys == tuple(keys[8:])
    assert not second.short
    setting.end(move)
    assert len(second.held) == 6
    setting.overflow.release("second")
    setting.check()


def test_a_host_full_of_transfers_makes_a_fetch_short() -> None:
    setting = Setting(8).survived(b"a", b"b")
    under_way = setting.host.reserve([name(number) for number in range(7)])
    fetch = setting.fetch("r", b"a", b"b")
    assert fetch.short
    (move,) = setting.plan().reads
    assert move.keys == (b"a",)
    setting.host.abort(under_way)
    setting.end(move)
    setting.overflow.release("r")
    setting.check()


def test_long_fetches_become_readable_piece_by_piece() -> None:
    keys = list(map(name, range(2 * MOVE_BLOCKS + 1)))
    setting = Setting(400, disk_slots=100).survived(*keys)
    setting.fetch("r", *keys)
    moves = setting.plan().reads
    assert [len(move.keys) for move in moves] == [MOVE_BLOCKS, MOVE_BLOCKS, 1]
    setting.end(moves[0])
    assert [key in setting.host.readable for key in keys].count(True) == MOVE_BLOCKS


def test_the_disk_forgets_what_it_has_lost_and_keeps_what_it_was_too_slow_for() -> None:
    setting = Setting().survived(b"a", b"b", b"c")
    fetch = setting.fetch("r", b"a", b"b", b"c")
    setting.end(*setting.plan().reads, failed=[0], lost=[1])
    assert [key in setting.disk.readable for key in (b"a", b"b", b"c")] == [True, False, True]
    assert [key in setting.host.readable for key in (b"a", b"b", b"c")] == [False, False, True]
    assert fetch.arrived == 1
    assert setting.counters.disk_failed_reads == 2
    setting.overflow.release("r")
    setting.check()


def test_what_arrives_late_is_in_the_host_but_not_held() -> None:
    setting = Setting().survived(b"a")
    fetch = setting.fetch("r", b"a")
    setting.overflow.release("r")
    assert setting.overflow.fetch_of("r") is None
    setting.end(*setting.plan().reads)
    assert b"a" in setting.host.readable
    assert not fetch.held
    setting.check()


def test_a_reset_forgets_what_is_on_disk_under_way_and_waiting() -> None:
    setting = Setting(16).survived(b"a", b"b").stored(b"c", b"d", b"e")
    (write,) = setting.plan().writes
    fetch = setting.fetch("r", b"a", b"b")
    (read,) = setting.plan().reads
    setting.host.clear()
    setting.overflow.reset()
    assert setting.overflow.fetch_of("r") is None
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
    setting.overflow.release("new")
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


def test_speed_is_learnt_from_what_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("kvortex.overflow.time.perf_counter", lambda: float(next(clock)))
    keys = list(map(name, range(64)))
    for failed, known in ((range(32), False), (range(16), True)):
        setting = Setting(200).survived(*keys)
        setting.fetch("r", *keys)
        setting.end(*setting.plan().reads, failed=failed)
        assert (setting.overflow.read_bytes_per_s > 0) is known
        assert (setting.overflow.read_seconds(10) > 0) is known


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
