"""Prefetcher: who is held back for what lies on disk, how long, and what is left of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvortex import KVortexConfig
from kvortex.core import DiskReport
from kvortex.prefix_match import Reach

if TYPE_CHECKING:
    from kvortex.connector.scheduler_side import SchedulerSide
    from kvortex.core import BlockKey
    from kvortex.overflow import Overflow

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

BLOCK = 16
SLOT_BYTES = 1 << 20
DEADLINE_MS = 500


class Clock:
    """The prefetcher's, which the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("kvortex.connector.prefetcher.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def request(tokens: int, number: int = 0) -> Any:
    """As much of vLLM's Request as is looked at; those of equal numbers have equal blocks."""
    hashes = [bytes([number]) * 24 + i.to_bytes(8, "big") for i in range(tokens // BLOCK)]
    return SimpleNamespace(
        request_id=f"r{number}",
        num_tokens=tokens,
        num_prompt_tokens=tokens,
        num_computed_tokens=0,
        status=SimpleNamespace(name="FINISHED_ABORTED"),
        block_hashes=hashes,
        kv_transfer_params=None,
        skip_reading_prefix_cache=False,
        lora_request=None,
    )


def side(*reaches: Reach, slots: int = 64, **settings: Any) -> tuple[SchedulerSide, Overflow]:
    """With empty disks that are not known yet."""
    from kvortex.connector.geometry import Geometry
    from kvortex.connector.scheduler_side import SchedulerSide

    geometry = Geometry(("a",), reaches or (Reach(),), 4096, BLOCK, SLOT_BYTES, 1)
    own = {"ram_pool_gb": slots / 1024, "disk_path": "/nowhere", "disk_pool_gb": 1.0}
    config = KVortexConfig(**own | {"disk_read_deadline_ms": DEADLINE_MS} | settings)
    keeper = SchedulerSide(config, geometry)
    assert keeper.offload.overflow is not None
    return keeper, keeper.offload.overflow


def on_disk(keeper: SchedulerSide, *asked: Any) -> list[BlockKey]:
    """The workers tell that all of the prompts' blocks are."""
    keys = [
        key
        for one in asked
        for group in range(len(keeper._reaches))
        for key in keeper._tracked.of(one).keys(group, 0, len(one.block_hashes))
    ]
    for one in asked:
        del keeper._tracked[one.request_id]
    survivors = {key: slot for slot, key in enumerate(keys)}
    keeper.offload.overflow.settle(DiskReport(survivors=survivors))  # type: ignore[union-attr]
    return keys


def end_reads(overflow: Overflow) -> int:
    """All that are planned end well; returns of how many blocks."""
    plan = overflow.take_plan()
    reads = plan.reads if plan is not None else ()
    overflow.settle(DiskReport({move.id: 1 for move in reads}))
    return sum(len(move.keys) for move in reads)


def allocated(keeper: SchedulerSide, asked: Any, external: int) -> None:
    """vLLM gives the request its blocks."""
    ids = list(range(1, len(asked.block_hashes) + 1))
    blocks: Any = SimpleNamespace(get_block_ids=lambda: (ids,) * len(keeper._reaches))
    keeper.allocated(asked, blocks, external)


def nothing_is_held(keeper: SchedulerSide, overflow: Overflow) -> bool:
    return overflow.fetches._room == overflow.fetches._most_held and not keeper._prefetcher._since  # type: ignore[union-attr]


def test_nothing_is_fetched_before_all_that_is_on_disk_is_known(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the request would go without the blocks that were not taken in yet."""
    monkeypatch.setattr("kvortex.overflow.ADOPT_S", -1.0)
    monkeypatch.setattr("kvortex.index.BATCH", 4)
    keeper, overflow = side()
    asked = request(160)
    on_disk(keeper, asked)
    while overflow.disk.index.resident < 4:
        overflow.take_plan()
    assert not overflow.known
    keeper.arrived(asked)
    assert keeper.match(asked, 0) == (None, False)
    while not overflow.known:
        assert overflow.take_plan() is None
    assert keeper.match(asked, 0) == (None, False)
    assert end_reads(overflow) == 9
    assert keeper.match(asked, 0)[0] == 144


def test_a_request_is_held_back_until_its_blocks_are_in_the_host(clock: Clock) -> None:
    keeper, overflow = side()
    asked = request(160)
    on_disk(keeper, asked)
    keeper.arrived(asked)
    assert keeper.match(asked, 0) == (None, False)
    assert end_reads(overflow) == 9  # a token is left to compute
    assert keeper.match(asked, 0)[0] == 144
    assert keeper.match(asked, 0)[0] == 144  # vLLM had no room for it, and asks again
    allocated(keeper, asked, 144)
    assert keeper.offload.counters.disk_hit_tokens == 144
    assert keeper.offload.counters.disk_late_reads == 0
    assert nothing_is_held(keeper, overflow)


def test_who_comes_before_the_disk_is_known_waits_for_that(clock: Clock) -> None:
    keeper, overflow = side()
    asked = request(160)
    keeper.arrived(asked)
    assert keeper.match(asked, 0) == (None, False)
    on_disk(keeper, asked)
    assert keeper.match(asked, 0) == (None, False)
    assert end_reads(overflow) == 9
    assert keeper.match(asked, 0)[0] == 144


def test_a_disk_that_never_tells_is_waited_for_until_the_deadline(clock: Clock) -> None:
    keeper, _ = side()
    asked = request(160)
    assert keeper.match(asked, 0) == (None, False)
    clock.now += 1
    assert keeper.match(asked, 0) == (0, False)
    assert keeper.offload.counters.disk_late_reads == 1


def test_who_is_late_is_computed_and_counted_once(clock: Clock) -> None:
    keeper, overflow = side()
    asked = request(160)
    keys = on_disk(keeper, asked)
    keeper.arrived(asked)
    clock.now += 5  # in the queue
    assert keeper.match(asked, 0) == (None, False)
    clock.now += DEADLINE_MS / 1e3 - 0.01
    assert keeper.match(asked, 0) == (None, False)
    clock.now += 0.02
    for _ in range(2):
        assert keeper.match(asked, 0) == (0, False)
    allocated(keeper, asked, 0)
    assert end_reads(overflow) == 9
    assert nothing_is_held(keeper, overflow)
    assert all(key in keeper.offload.tier.readable for key in keys[:9])
    assert all(block.pins == 0 for block in keeper.offload.tier.index)
    assert keeper.offload.counters.disk_late_reads == 1
    assert keeper.offload.counters.disk_hit_tokens == 0


@pytest.mark.parametrize("sent", [True, False])
def test_an_abort_leaves_what_is_being_read_to_others(clock: Clock, sent: bool) -> None:
    keeper, overflow = side()
    asked = request(160)
    on_disk(keeper, asked)
    keeper.arrived(asked)
    keeper.match(asked, 0)
    plan = overflow.take_plan() if sent else None
    keeper.finished(asked)
    assert nothing_is_held(keeper, overflow) is False  # slots are promised until the disk answers
    if plan is not None:
        overflow.settle(DiskReport({move.id: 1 for move in plan.reads}))
    else:
        end_reads(overflow)
    assert nothing_is_held(keeper, overflow)
    assert not keeper._tracked
    other = request(160)
    assert keeper.match(other, 0)[0] == 144
    assert all(block.pins == 0 for block in keeper.offload.tier.index)


def test_nothing_is_fetched_while_reading_is_off(clock: Clock) -> None:
    keeper, overflow = side()
    asked = request(160)
    on_disk(keeper, asked)
    overflow.settle(DiskReport(reading_off=1))
    keeper.arrived(asked)
    assert keeper.match(asked, 0) == (0, False)
    assert overflow.take_plan() is None
    overflow.settle(DiskReport(reading_off=-1))
    assert keeper.match(asked, 0) == (None, False)
    assert end_reads(overflow) == 9


def test_a_request_that_was_preempted_fetches_anew(clock: Clock) -> None:
    keeper, overflow = side()
    asked = request(160)
    on_disk(keeper, asked)
    keeper.arrived(asked)
    end_reads(overflow)
    assert keeper.match(asked, 0)[0] == 144
    allocated(keeper, asked, 144)
    keeper.offload.take_plan()
    for flight in list(keeper.offload._flights.values()):
        keeper.offload.tier.unpin(flight.blocks)
    keeper.offload.tier.clear()  # others needed the host
    assert keeper.match(asked, 0) == (None, False)
    assert end_reads(overflow) == 9
    assert keeper.match(asked, 0)[0] == 144


def test_a_deep_queue_is_served_one_after_the_other(clock: Clock) -> None:
    """Those that found no room when they came find it when it is their turn."""
    keeper, overflow = side(slots=32)
    queue = [request(160, number) for number in range(6)]
    on_disk(keeper, *queue)
    for asked in queue:
        keeper.arrived(asked)
    assert end_reads(overflow) == 16
    for asked in queue:
        while (told := keeper.match(asked, 0)[0]) is None:
            assert end_reads(overflow)
        assert told == 144
        allocated(keeper, asked, told)
        keeper.offload.take_plan()
        for job_id in list(keeper.offload._flights):
            keeper.offload._end(keeper.offload._flights.pop(job_id))
        keeper.finished(asked)
    assert nothing_is_held(keeper, overflow)


def test_what_takes_longer_to_read_than_to_compute_is_not_fetched(clock: Clock) -> None:
    keeper, overflow = side()
    asked = request(160)
    on_disk(keeper, asked)
    keeper.costs.prefill_tokens_per_s, keeper.costs.load_bytes_per_s = 10_000, 1e12
    for speed, held_back in ((1e6, False), (1e12, True)):
        overflow.fetches._bytes_per_s = speed
        assert (keeper.match(asked, 0)[0] is None) is held_back


def test_of_a_window_only_what_is_seen_is_fetched(clock: Clock) -> None:
    keeper, overflow = side(Reach(window=32))
    asked = request(161)
    on_disk(keeper, asked)
    keeper.arrived(asked)
    assert end_reads(overflow) == 2
    assert keeper.match(asked, 0)[0] == 160


def test_who_may_not_read_the_cache_is_not_held_back(clock: Clock) -> None:
    keeper, overflow = side()
    asked = request(160)
    on_disk(keeper, asked)
    asked.skip_reading_prefix_cache = True
    keeper.arrived(asked)
    assert keeper.match(asked, 0) == (0, False)
    assert end_reads(overflow) == 0


def test_a_reset_lets_those_that_wait_go(clock: Clock) -> None:
    keeper, overflow = side()
    asked = request(160)
    on_disk(keeper, asked)
    keeper.arrived(asked)
    assert keeper.match(asked, 0) == (None, False)
    keeper.reset()
    assert keeper.match(asked, 0) == (0, False)
    end_reads(overflow)
    assert keeper.match(asked, 0) == (0, False)
