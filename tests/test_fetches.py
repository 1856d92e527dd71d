"""Fetches: what is read, what is held meanwhile and for whom."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from overflows import Setting, name

from kvortex.fetches import MOVE_BLOCKS

if TYPE_CHECKING:
    import pytest


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
    setting.overflow.fetches.release("r")
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
    assert setting.overflow.fetches._room == 16 // 2 - 3
    setting.overflow.fetches.release("one")
    block = setting.host.lookup(b"b")
    assert block is not None
    assert block.pins == 1
    setting.overflow.fetches.release("other")
    setting.check()


def test_who_waits_for_anothers_read_does_so_after_that_is_gone() -> None:
    setting = Setting().survived(b"a")
    setting.fetch("one", b"a")
    other = setting.fetch("other", b"a")
    setting.overflow.fetches.release("one")
    (move,) = setting.plan().reads
    assert other.under_way
    setting.end(move)
    assert other.arrived == 1
    assert list(other.held) == [b"a"]
    setting.overflow.fetches.release("other")
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
        setting.overflow.fetches.release(request_id)
    assert setting.fetch("second", *keys[6:]) is second
    (move,) = setting.plan().reads
    assert move.keys == tuple(keys[8:])
    assert not second.short
    setting.end(move)
    assert len(second.held) == 6
    setting.overflow.fetches.release("second")
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
    setting.overflow.fetches.release("r")
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
    assert setting.counters.disk_failed_reads == 1
    setting.overflow.fetches.release("r")
    setting.check()


def test_what_arrives_late_is_in_the_host_but_not_held() -> None:
    setting = Setting().survived(b"a")
    fetch = setting.fetch("r", b"a")
    setting.overflow.fetches.release("r")
    assert setting.overflow.fetches.of("r") is None
    setting.end(*setting.plan().reads)
    assert b"a" in setting.host.readable
    assert not fetch.held
    setting.check()


def test_speed_is_learnt_from_what_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("kvortex.fetches.time.perf_counter", lambda: float(next(clock)))
    keys = list(map(name, range(64)))
    for failed, known in ((range(32), False), (range(16), True)):
        setting = Setting(200).survived(*keys)
        setting.fetch("r", *keys)
        setting.end(*setting.plan().reads, failed=failed)
        assert (setting.overflow.fetches.bytes_per_s > 0) is known
        assert (setting.overflow.fetches.seconds(10) > 0) is known
