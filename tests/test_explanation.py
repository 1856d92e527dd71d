"""Why a request's tokens were computed, told by the real scheduler side without an engine."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvortex import KVortexConfig
from kvortex.core import DiskReport, StepReport
from kvortex.metrics import MISSED
from kvortex.prefix_match import Reach

if TYPE_CHECKING:
    from pathlib import Path

    from kvortex.connector.scheduler_side import SchedulerSide

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

BLOCK = 16
SLOTS = 8
TOKENS = 8 * BLOCK + 1


class Pool:
    """vLLM's, with nothing in its prefix cache."""

    blocks = tuple(SimpleNamespace(is_null=False, ref_cnt=1) for _ in range(64))

    def touch(self, blocks: list[Any]) -> None: ...

    def free_blocks(self, blocks: Any) -> None: ...

    def get_cached_block(self, block_hash: bytes, groups: list[int]) -> None: ...


def side(*reaches: Reach, **settings: Any) -> SchedulerSide:
    """With a host pool of SLOTS blocks."""
    from kvortex.connector.geometry import Geometry
    from kvortex.connector.scheduler_side import SchedulerSide

    geometry = Geometry(("a",), reaches or (Reach(),), 4096, BLOCK, 1 << 27, 1)
    keeper = SchedulerSide(KVortexConfig(ram_pool_gb=1, **settings), geometry)
    assert keeper.offload.tier.index.num_slots == SLOTS
    keeper.bind_gpu_block_pool(Pool())
    return keeper


def request(name: str, number: int = 0, tokens: int = TOKENS, **params: object) -> Any:
    """As much of vLLM's Request as is looked at; prompts of one number have one prefix."""
    return SimpleNamespace(
        request_id=name,
        num_tokens=tokens,
        num_prompt_tokens=tokens,
        num_computed_tokens=0,
        status=SimpleNamespace(name="FINISHED_STOPPED"),
        block_hashes=[bytes([number]) * 24 + i.to_bytes(8, "big") for i in range(tokens // BLOCK)],
        kv_transfer_params=params or None,
        skip_reading_prefix_cache=False,
        lora_request=None,
    )


def begin(keeper: SchedulerSide, asked: Any, on_gpu: int = 0) -> None:
    """vLLM takes a request up and gives it blocks."""
    keeper.arrived(asked)
    matched = keeper.match(asked, on_gpu * BLOCK)[0]
    assert matched is not None
    ids = list(range(len(asked.block_hashes)))
    groups = tuple(ids for _ in keeper._reaches)
    keeper.allocated(asked, SimpleNamespace(get_block_ids=lambda: groups), matched)


def compute(keeper: SchedulerSide, asked: Any) -> list[int]:
    """The ids of the jobs that store what a step computes of it."""
    cached = SimpleNamespace(
        req_ids=[asked.request_id],
        new_block_ids=[None],
        num_computed_tokens=[0],
        resumed_req_ids=set(),
    )
    step: Any = SimpleNamespace(
        num_scheduled_tokens={asked.request_id: asked.num_tokens},
        total_num_scheduled_tokens=asked.num_tokens,
        preempted_req_ids=set(),
        scheduled_new_reqs=[],
        scheduled_cached_reqs=cached,
    )
    return [job.id for job in keeper.plan(step).stores]


def settle(keeper: SchedulerSide, jobs: list[int], failed: bool = False) -> None:
    from kvortex.connector.messages import ReportMessage

    report = StepReport(dict.fromkeys(jobs, 1), failed=frozenset(jobs if failed else ()))
    told: Any = SimpleNamespace(
        invalid_block_ids=set(), kv_connector_worker_meta=ReportMessage(report)
    )
    keeper.settle(told)


def stored(keeper: SchedulerSide, number: int, tokens: int = TOKENS) -> None:
    """A request comes, is computed, stored and gone."""
    asked = request(f"of {number}", number, tokens)
    begin(keeper, asked)
    settle(keeper, compute(keeper, asked))
    keeper.finished(asked)


def misses(keeper: SchedulerSide) -> dict[str, float]:
    """Those counted since the last call."""
    counters = keeper.offload.counters
    counted = {
        name.removeprefix(MISSED): n
        for name, n in counters.as_dict().items()
        if name.startswith(MISSED) and n
    }
    for reason in counted:
        setattr(counters, MISSED + reason, 0)
    return counted


def test_a_new_prompt_was_never_stored() -> None:
    keeper = side()
    begin(keeper, request("new"), on_gpu=2)
    assert misses(keeper) == {"never_stored": 6 * BLOCK}


def test_a_prompt_that_is_there_misses_nothing() -> None:
    keeper = side()
    stored(keeper, 0)
    misses(keeper)
    begin(keeper, request("again"))
    assert misses(keeper) == {}


def test_what_others_pushed_out_is_evicted() -> None:
    keeper = side(admission="always", eviction_policy="lru")
    stored(keeper, 0)
    stored(keeper, 1)
    misses(keeper)
    begin(keeper, request("again"))
    assert misses(keeper) == {"evicted": 8 * BLOCK}


def test_the_first_missing_block_tells() -> None:
    """The tail leaves first; a new tail behind it is evicted, too, since it needs what is gone."""
    keeper = side(admission="always", eviction_policy="lru")
    stored(keeper, 0)
    stored(keeper, 1, tokens=2 * BLOCK + 1)
    misses(keeper)
    begin(keeper, request("longer", tokens=12 * BLOCK + 1))
    assert keeper.offload.counters.hit_tokens == 6 * BLOCK
    assert misses(keeper) == {"evicted": 6 * BLOCK}


def test_what_the_filter_kept_out_is_not_admitted() -> None:
    keeper = side(admission="second_sight")
    stored(keeper, 0)
    stored(keeper, 1)
    misses(keeper)
    begin(keeper, request("again", 1))
    assert misses(keeper) == {"not_admitted": 8 * BLOCK}


def test_slots_that_transfers_hold_leave_no_slot() -> None:
    keeper = side(admission="always")
    first, second = request("first"), request("second", 1)
    begin(keeper, first)
    compute(keeper, first)
    begin(keeper, second)
    assert compute(keeper, second) == []
    misses(keeper)
    begin(keeper, request("again", 1))
    assert misses(keeper) == {"no_slot": 8 * BLOCK}


def test_a_store_under_way_is_in_flight() -> None:
    keeper, first = side(), request("first")
    begin(keeper, first)
    jobs = compute(keeper, first)
    misses(keeper)
    begin(keeper, request("at once"))
    assert misses(keeper) == {"in_flight": 8 * BLOCK}
    settle(keeper, jobs)
    begin(keeper, request("later"))
    assert misses(keeper) == {}


def test_a_store_that_failed_is_told() -> None:
    keeper, first = side(), request("first")
    begin(keeper, first)
    settle(keeper, compute(keeper, first), failed=True)
    misses(keeper)
    begin(keeper, request("again"))
    assert misses(keeper) == {"failed": 8 * BLOCK}


def test_a_load_that_failed_is_missed_by_its_request_and_the_next() -> None:
    keeper = side()
    stored(keeper, 0)
    misses(keeper)
    begin(keeper, request("again"))
    loads = [job.id for job in keeper.offload.take_plan().loads]
    settle(keeper, loads, failed=True)
    assert misses(keeper) == {"failed": 8 * BLOCK}
    begin(keeper, request("once more"))
    assert misses(keeper) == {"failed": 8 * BLOCK}


def test_a_hit_that_does_not_pay_is_told_apart_from_what_is_new() -> None:
    keeper = side(min_load_tokens=10**6)
    stored(keeper, 0, tokens=5 * BLOCK + 1)
    misses(keeper)
    begin(keeper, request("again"))
    assert misses(keeper) == {"not_worth_loading": 5 * BLOCK, "never_stored": 3 * BLOCK}


@pytest.mark.parametrize(("limit", "missed"), [(0, 8), (3 * BLOCK + 1, 5), (8 * BLOCK, 0)])
def test_a_limit_is_the_clients_own(limit: int, missed: int) -> None:
    keeper = side()
    stored(keeper, 0)
    misses(keeper)
    begin(keeper, request("again", max_load_tokens=limit))
    assert misses(keeper) == ({"limit": missed * BLOCK} if missed else {})


def test_a_request_that_may_read_no_cache_has_a_limit() -> None:
    keeper, asked = side(), request("scored")
    asked.skip_reading_prefix_cache = True
    begin(keeper, asked)
    assert misses(keeper) == {"limit": 8 * BLOCK}


def test_a_window_names_the_block_that_it_lacks() -> None:
    """All of group 0 is there; of the window's blocks the last is evicted."""
    keeper, asked = side(Reach(), Reach(window=2 * BLOCK)), request("first", tokens=4 * BLOCK + 1)
    tracked = keeper._tracked.of(asked)
    keys = [*tracked.keys(0, 0, 4), *tracked.keys(1, 0, 4)]
    job = keeper.offload.store(keys, list(range(8)))
    assert job is not None
    settle(keeper, [job.id])
    block = keeper.offload.tier.lookup(keys[-1])
    assert block is not None
    keeper.offload.tier.forget([block])
    keeper.offload._note_evicted(block)
    keeper.finished(asked)
    begin(keeper, request("again", tokens=4 * BLOCK + 1))
    assert misses(keeper) == {"evicted": BLOCK}


def test_a_resumed_request_is_not_counted_twice() -> None:
    keeper, asked = side(), request("first")
    begin(keeper, asked)
    begin(keeper, asked)
    assert misses(keeper) == {"never_stored": 8 * BLOCK}


def with_disk(folder: Path, **settings: Any) -> SchedulerSide:
    """What lies there from a former life are the blocks of prompt 0."""
    keeper = side(disk_path=str(folder), disk_pool_gb=2, **settings)
    assert keeper.offload.overflow is not None
    keys = keeper._tracked.of(request("former")).keys(0, 0, 8)
    survivors = {key: slot for slot, key in enumerate(keys)}
    keeper.offload.settle(StepReport({}, disk=DiskReport({}, survivors=survivors)))
    keeper._tracked.clear()
    return keeper


def test_what_the_disk_does_not_bring_in_time_is_late(tmp_path: Path) -> None:
    keeper = with_disk(tmp_path, disk_read_deadline_ms=1)
    asked = request("again")
    keeper.arrived(asked)
    while keeper.match(asked, 0)[0] is None:
        pass
    begin(keeper, asked)
    assert misses(keeper) == {"late": 8 * BLOCK}


@pytest.mark.parametrize("for_good", [False, True])
def test_what_the_disk_does_not_give_back_failed_unless_it_is_there_still(
    tmp_path: Path, for_good: bool
) -> None:
    keeper, asked = with_disk(tmp_path), request("again", tokens=4 * BLOCK + 1)
    keeper.arrived(asked)
    plan = keeper.offload.take_plan().disk
    assert plan is not None
    bad = {move.id: frozenset(np.arange(len(move.keys)).tolist()) for move in plan.reads}
    report = DiskReport(dict.fromkeys(bad, 1), failed=bad, lost=bad if for_good else {})
    keeper.offload.settle(StepReport({}, disk=report))
    begin(keeper, asked)
    assert misses(keeper) == {"failed" if for_good else "late": 4 * BLOCK}


def test_what_left_the_host_before_it_was_written_is_evicted(tmp_path: Path) -> None:
    keeper = with_disk(tmp_path, admission="always", eviction_policy="lru")
    stored(keeper, 1)
    stored(keeper, 2)
    misses(keeper)
    assert keeper.offload.counters.disk_missed_writes == 8
    begin(keeper, request("again", 1))
    assert misses(keeper) == {"evicted": 8 * BLOCK}


def test_a_hit_on_disk_that_does_not_pay_stays_there(tmp_path: Path) -> None:
    keeper = with_disk(tmp_path, min_load_tokens=10**6)
    begin(keeper, request("again", tokens=10 * BLOCK + 1))
    assert misses(keeper) == {"not_worth_loading": 8 * BLOCK, "never_stored": 2 * BLOCK}


def test_a_client_is_told(caplog: pytest.LogCaptureFixture) -> None:
    keeper = side(min_load_tokens=3 * BLOCK)
    stored(keeper, 0, tokens=3 * BLOCK + 1)
    asked = request("again", explain=True)
    with caplog.at_level(logging.INFO, "kvortex"):
        begin(keeper, asked)
    told = f"0 tokens were on the GPU, {3 * BLOCK} loaded, computed: {5 * BLOCK} never_stored"
    assert [record.getMessage() for record in caplog.records] == [f"Request again: {told}."]
    explanation = keeper.finished(asked)
    assert explanation is not None
    assert explanation.as_dict() == {
        "gpu_tokens": 0,
        "loaded_tokens": 3 * BLOCK,
        "missed_tokens": {"never_stored": 5 * BLOCK},
    }


def test_others_are_not_told_but_a_debug_log_is(caplog: pytest.LogCaptureFixture) -> None:
    keeper, asked = side(), request("quiet")
    with caplog.at_level(logging.DEBUG, "kvortex"):
        begin(keeper, asked)
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]
    assert keeper.finished(asked) is None
