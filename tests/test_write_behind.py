"""WriteBehind: what is written to disk, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from overflows import BLOCK_BYTES, PLACE, Setting, name

from kvortex.core import ConfigError
from kvortex.disk.pace import BURST_S, Pace, require_pace
from kvortex.policies import SecondSight

if TYPE_CHECKING:
    from kvortex.core import DiskMove


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


@pytest.mark.parametrize("delay", [0.0, 0.4, 5.0])
@pytest.mark.parametrize("block_s", [0.01, 0.3, 1.7, 4.0, 60.0])
def test_a_small_limit_makes_writing_slow_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, block_s: float, delay: float
) -> None:
    """However late the worker, which keeps to a pace of its own, hears of the first plan."""
    now, count = 100.0, 12
    monkeypatch.setattr("kvortex.write_behind.time.monotonic", lambda: now)
    setting = Setting(256, speed=BLOCK_BYTES / block_s).stored(*map(name, range(count)))
    worker = Pace(BLOCK_BYTES / block_s)
    on_their_way: list[tuple[float, DiskMove]] = []
    under_way: list[tuple[float, DiskMove]] = []
    while setting.overflow.pending and now < 1000 + count * block_s:
        heard = now + (delay if now == 100 else 0.0)
        on_their_way += [(heard, move) for move in setting.plan().writes]
        for heard, move in [one for one in on_their_way if one[0] <= now]:
            on_their_way.remove((heard, move))
            starts = [worker.appoint(BLOCK_BYTES, now) for _ in move.keys]
            assert None not in starts
            under_way.append((max(filter(None, starts)), move))
        for end, move in [one for one in under_way if one[0] <= now]:
            under_way.remove((end, move))
            setting.end(move)
        now += 0.02
    assert setting.counters.disk_written_blocks == count
    assert setting.counters.disk_missed_writes == 0
    at_pace = (count - 1) * block_s - BURST_S
    assert at_pace <= now - 100 <= max(0, at_pace) + delay + 1.5
    setting.check()


def test_a_limit_by_which_next_to_nothing_is_written_is_refused() -> None:
    require_pace(None, 4 << 20)
    require_pace(0.1, 4 << 20)
    told = r"disk_max_write_mb_s=0\.05: one KV block has 4\.19 MB and .* at least .*=0\.0706"
    with pytest.raises(ConfigError, match=told):
        require_pace(0.05, 4 << 20)
    require_pace(0.0706, 4 << 20)


def test_a_block_that_is_only_arriving_goes_on_waiting() -> None:
    setting = Setting()
    blocks = setting.host.reserve([b"a"])
    setting.overflow.write_behind.consider(b"a", PLACE)
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
    assert len(setting.overflow.write_behind._waiting) == 8


def test_a_store_that_came_to_nothing_is_not_waited_for() -> None:
    setting = Setting()
    blocks = setting.host.reserve([b"a"])
    setting.overflow.write_behind.consider(b"a", PLACE)
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


def test_failed_writes_are_not_on_disk() -> None:
    setting = Setting(64).stored(b"a", b"b", b"c")
    (move,) = setting.plan().writes
    setting.end(move, failed=[0], lost=[1])
    assert [setting.disk.lookup(key) is not None for key in move.keys] == [False, False, True]
    assert setting.counters.disk_failed_writes == 1  # the other one was only refused, or slow
    assert setting.counters.disk_written_blocks == 1
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
