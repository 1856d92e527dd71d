"""What the scheduler side answers vLLM, on the real classes but without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from simulated_vllm import make_request

from kvortex import KVortexConfig
from kvortex.core import ConfigError, DiskReport, StepReport
from kvortex.prefix_match import Reach

if TYPE_CHECKING:
    from collections.abc import Container
    from pathlib import Path

    from kvortex.connector.scheduler_side import SchedulerSide

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

BLOCK = 16
SLOT_BYTES = 1 << 20


def side(*reaches: Reach, runner: Any = None, **settings: Any) -> SchedulerSide:
    from kvortex.connector.geometry import Geometry
    from kvortex.connector.scheduler_side import SchedulerSide

    geometry = Geometry(("a",), reaches or (Reach(),), 4096, BLOCK, SLOT_BYTES, 1)
    config = KVortexConfig(ram_pool_gb=4, **settings)
    return SchedulerSide(config, geometry, runner=runner)


def request(tokens: int, params: dict[str, object] | None = None, number: int = 0) -> Any:
    """As much of vLLM's Request as is looked at."""
    hashes = [bytes([number]) * 24 + i.to_bytes(8, "big") for i in range(tokens // BLOCK)]
    return SimpleNamespace(
        request_id=f"r{number}",
        num_tokens=tokens,
        num_computed_tokens=0,
        num_in_flight_tokens=0,
        num_stale_output_tokens=0,
        num_output_placeholders=0,
        status=SimpleNamespace(name="FINISHED_ABORTED"),
        block_hashes=hashes,
        kv_transfer_params=params,
        skip_reading_prefix_cache=False,
        lora_request=None,
    )


def filled(keeper: SchedulerSide, asked: Any) -> SchedulerSide:
    """All of a prompt's blocks are readable."""
    groups = range(len(keeper._reaches))
    keys = [
        key for g in groups for key in keeper._tracked.of(asked).keys(g, 0, len(asked.block_hashes))
    ]
    job = keeper.offload.store(keys, list(range(len(keys))))
    assert job is not None
    keeper.offload.settle(StepReport({job.id: 1}))
    return keeper


def told(report: StepReport) -> Any:
    """As vLLM passes on what workers report."""
    from kvortex.connector.messages import ReportMessage

    return SimpleNamespace(invalid_block_ids=set(), kv_connector_worker_meta=ReportMessage(report))


def test_whole_blocks_and_a_token_left() -> None:
    assert filled(side(), request(160)).match(request(160), 0) == (144, False)
    assert filled(side(), request(161)).match(request(161), 32) == (128, False)
    assert filled(side(), request(160)).match(request(160), 33) == (0, False)


class Counted:
    """Keys, and how often one was looked for."""

    def __init__(self, keys: Container[bytes]) -> None:
        self.lookups = 0
        self._keys = keys

    def __contains__(self, key: bytes) -> bool:
        self.lookups += 1
        return key in self._keys


def test_a_prompt_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a disk, where only what is behind the last block in the host is looked for."""
    asked = request(160)
    keeper = filled(side(disk_path="/nowhere", disk_pool_gb=8.0), asked)
    keeper.settle(told(StepReport(disk=DiskReport(survivors={}))))
    overflow = keeper.offload.overflow
    assert overflow is not None
    host, both = Counted(keeper.offload.tier.readable), Counted(overflow.readable)
    monkeypatch.setattr(keeper._loads, "_readable", host)
    monkeypatch.setattr(type(overflow), "readable", both)
    assert keeper.match(asked, 0) == (144, False)
    assert (host.lookups, both.lookups) == (9, 0)
    longer = request(320)
    longer.request_id = "longer"
    assert keeper.match(longer, 0) == (160, False)
    assert (host.lookups, both.lookups) == (9 + 11, 1)


@pytest.mark.parametrize(
    ("limit", "loaded"), [(0, 0), (15, 0), (16, 16), (100, 96), (10**9, 144), (-1, 144), ("x", 144)]
)
def test_a_client_limits_what_is_loaded(limit: object, loaded: int) -> None:
    asked = request(160, {"max_load_tokens": limit})
    assert filled(side(), asked).match(asked, 0) == (loaded, False)


def test_a_short_hit_is_computed() -> None:
    asked = request(160)
    assert filled(side(min_load_tokens=144), asked).match(asked, 0) == (144, False)
    assert filled(side(min_load_tokens=145), asked).match(asked, 0) == (0, False)


def test_a_hit_is_loaded_where_that_is_faster() -> None:
    asked = request(1600)
    for load, link, loaded in (("auto", 1e12, 1584), ("auto", 1e6, 0), ("always", 1e6, 1584)):
        keeper = filled(side(load=load), asked)
        keeper.costs.prefill_tokens_per_s, keeper.costs.load_bytes_per_s = 10_000, link
        assert keeper.match(asked, 0)[0] == loaded


def test_the_decision_follows_the_link_in_use() -> None:
    asked = request(1600)
    keeper = filled(side(), asked)
    keeper.costs.prefill_tokens_per_s = 10_000
    for link, loaded in ((1e12, 1584), (1e6, 0), (None, 0), (1e12, 1584)):
        report = StepReport(load_bytes_per_s=link, store_bytes_per_s=link and 2 * link)
        keeper.settle(told(report))
        assert keeper.match(asked, 0)[0] == loaded
    assert keeper.gauges.load_bytes_per_second == 1e12
    assert keeper.gauges.store_bytes_per_second == 2e12


def test_a_long_load_waits_apart_only_beside_others() -> None:
    asked = request(16_000)
    keeper = filled(side(), asked)
    keeper.costs.load_bytes_per_s = 50e9  # 1 GB: 20 ms
    assert keeper.match(asked, 0) == (15_984, False)
    keeper._turns.running = 1
    assert keeper.match(asked, 0) == (15_984, True)
    assert keeper.match(asked, 15_200) == (784, False)  # 1 ms


@pytest.mark.parametrize("can_name", [True, False])
def test_several_groups_wait_apart_where_only_so_a_failure_can_be_told(
    can_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.26 cannot be told of requests at all."""
    asked = request(160)
    monkeypatch.setattr("kvortex.connector.geometry.CAN_NAME_REQUESTS", can_name)
    assert filled(side(Reach(), Reach()), asked).match(asked, 0) == (144, can_name)


def test_what_loading_is_asked_for_is_checked() -> None:
    with pytest.raises(ConfigError, match="load='never': input should be 'auto' or 'always'"):
        KVortexConfig(load="never")
    with pytest.raises(ConfigError, match=r"min_load_tokens=-1: .*at least 0"):
        KVortexConfig(min_load_tokens=-1)


def test_a_limit_that_lets_nothing_be_written_is_refused(tmp_path: Path) -> None:
    disk = {"disk_path": str(tmp_path), "disk_pool_gb": 1}
    side(**disk, disk_max_write_mb_s=0.02)
    with pytest.raises(ConfigError, match=r"disk_max_write_mb_s=0\.01: one KV block has 1\.05 MB"):
        side(**disk, disk_max_write_mb_s=0.01)


def test_a_thousand_blocks_are_looked_up_quickly(benchmark: Any) -> None:
    """The request's keys are made once, when it is first seen."""
    asked = request(16_016)
    keeper = filled(side(), asked)
    assert benchmark(lambda: keeper.match(asked, 0)) == (16_000, False)


def test_keys_are_vllms_own() -> None:
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

    asked = request(48)
    own = [make_block_hash_with_group_id(BlockHash(h), 1) for h in asked.block_hashes]
    assert side(Reach(), Reach())._tracked.of(asked).keys(1, 0, 3) == own


class Pool:
    """vLLM's, of blocks that nobody ever waits for."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [SimpleNamespace(is_null=not n, ref_cnt=1) for n in range(num_blocks)]
        self.evicted: set[int] = set()

    def touch(self, blocks: list[Any]) -> None: ...

    def free_blocks(self, blocks: Any) -> None: ...

    def evict_blocks(self, block_ids: set[int]) -> None:
        self.evicted |= block_ids


def allocated(keeper: SchedulerSide, asked: Any, block_ids: list[int], external: int) -> None:
    """vLLM gives the request its blocks."""
    blocks: Any = SimpleNamespace(get_block_ids=lambda: (block_ids,))
    keeper.allocated(asked, blocks, external)


def planned(keeper: SchedulerSide, asked: Any, before: int, tokens: int) -> list[int]:
    """The blocks that are stored of a step that computes so many tokens of a running request."""
    cached = SimpleNamespace(
        req_ids=[asked.request_id],
        new_block_ids=[None],
        num_computed_tokens=[before],
        resumed_req_ids=set(),
    )
    step: Any = SimpleNamespace(
        num_scheduled_tokens={asked.request_id: tokens},
        total_num_scheduled_tokens=tokens,
        scheduled_new_reqs=[],
        scheduled_cached_reqs=cached,
        preempted_req_ids=set(),
    )
    return [block for job in keeper.plan(step).stores for block in job.block_ids.tolist()]


def test_where_nothing_runs_who_is_loaded_goes_first() -> None:
    """vLLM 0.26 finds no room for another that stands before it, and looks no further."""
    loaded, other = request(160), request(320, number=1)
    keeper = filled(side(), loaded)
    keeper.costs.load_bytes_per_s = 1e6
    keeper.costs.prefill_tokens_per_s = 1e-3
    keeper._turns.running = 1
    assert keeper.match(loaded, 0) == (144, True)
    allocated(keeper, loaded, list(range(10)), 144)
    (job,) = keeper.offload._flights.values()
    keeper._turns.running = 0
    assert keeper.match(other, 0) == (0, False)  # while the load is under way it may run
    keeper.settle(told(StepReport({job.job.id: 1})))
    assert keeper.match(other, 0) == (None, False)
    keeper._turns.running = 1
    assert keeper.match(other, 0) == (0, False)
    keeper._turns.running = 0
    assert keeper.match(loaded, 0)[0] is not None  # to be asked again is its turn
    assert keeper.match(other, 0) == (0, False)


@pytest.mark.parametrize("ends", ["runs", "finished"])
def test_nobody_gives_way_to_who_runs_or_is_gone(ends: str) -> None:
    loaded, other = request(160), request(320, number=1)
    keeper = filled(side(), loaded)
    keeper._tracked.of(loaded).block_ids = [list(range(10))]
    keeper._turns.loaded(loaded.request_id)
    assert keeper.match(other, 0) == (None, False)
    if ends == "runs":
        planned(keeper, loaded, 144, 16)
        keeper._turns.running = 0
    else:
        keeper.finished(loaded)
    assert keeper.match(other, 0) == (0, False)


def test_blocks_behind_a_window_belong_to_others() -> None:
    """vLLM does not say that it took them; a failed load has every block considered again."""
    keeper, asked = side(Reach(window=32)), request(96)
    keeper.bind_gpu_block_pool(Pool(16))
    keeper.match(asked, 0)
    allocated(keeper, asked, [1, 2, 3, 4, 5, 6], 0)
    assert planned(keeper, asked, 0, 64) == [1, 2, 3, 4]
    keeper.offload.settle(StepReport({0: 1}, failed=frozenset({0})))
    keeper._stores.rewind(keeper._tracked.values())
    assert planned(keeper, asked, 64, 32) == [3, 4, 5, 6]


def test_what_another_connector_was_to_load_is_not_ours_to_store() -> None:
    """Of the children of a MultiConnector, all see the blocks; vLLM counts them as computed."""
    keeper, asked = side(), request(96)
    keeper.bind_gpu_block_pool(Pool(16))
    keeper.match(asked, 0)
    allocated(keeper, asked, [1, 2, 3, 4, 5, 6], 0)
    asked.num_computed_tokens = 96  # promised, and aborted before it arrived
    keeper.finished(asked)
    assert keeper.offload.take_plan().stores == ()


def test_another_connectors_failed_load_spoils_what_is_under_way() -> None:
    keeper, asked = side(), request(96)
    pool: Any = Pool(16)
    keeper.bind_gpu_block_pool(pool)
    keeper.match(asked, 0)
    allocated(keeper, asked, [1, 2, 3, 4, 5, 6], 0)
    assert planned(keeper, asked, 32, 64) == [1, 2, 3, 4, 5, 6]
    asked.num_computed_tokens = 96
    failed: Any = SimpleNamespace(invalid_block_ids={2}, kv_connector_worker_meta=None)
    keeper.settle(failed)
    keeper.offload.settle(StepReport({0: 1}))
    assert asked.num_computed_tokens == 16
    assert keeper.offload.tier.index.resident == 0
    assert keeper._tracked[asked.request_id].considered == 1
    assert pool.evicted == {2, 3, 4, 5, 6}


class Runner:
    """Notes who is handed over in each step; those of which it is not asked are in none."""

    def __init__(self) -> None:
        self.told: list[list[str]] = []

    def hand_over(self, output: Any, went_back: Any) -> None:
        self.told.append([one.request.request_id for one in went_back])


def test_a_runner_is_told_until_it_has_heard_who_went_back() -> None:
    runner = Runner()
    keeper, asked, other = side(runner=runner), request(96), request(96, number=1)
    keeper.bind_gpu_block_pool(Pool(16))
    for one, block_ids in ((asked, [1, 2, 3, 4, 5, 6]), (other, [7, 8, 9, 10, 11, 12])):
        keeper.match(one, 0)
        allocated(keeper, one, block_ids, 0)
        planned(keeper, one, 32, 64)
        one.num_computed_tokens = 96
    failed: Any = SimpleNamespace(invalid_block_ids={2}, kv_connector_worker_meta=None)
    keeper.settle(failed)
    planned(keeper, other, 96, 1)  # there was no room for the other
    planned(keeper, asked, 16, 80)
    planned(keeper, asked, 96, 1)
    assert runner.told == [["r0"], ["r0"]]
    keeper.settle(failed)
    keeper.finished(asked)
    planned(keeper, other, 97, 1)
    assert runner.told == [["r0"], ["r0"]]


def went_back(name: str, block_ids: list[int], outputs: list[int]) -> Any:
    """One of vLLM's own requests, of twenty tokens, as the scheduler's side has it."""
    from kvortex.connector.tracked_request import TrackedRequest

    asked = make_request(name, list(range(20)), 8, None)
    asked.append_output_token_ids(outputs)
    asked.num_computed_tokens = 16
    tracked = TrackedRequest.of(asked)
    tracked.block_ids = [block_ids]
    return tracked


def image(offset: int, length: int) -> Any:
    from vllm.multimodal.inputs import PlaceholderRange

    return SimpleNamespace(mm_position=PlaceholderRange(offset=offset, length=length), data=None)


def scheduled() -> Any:
    """A step of three requests that were in the step before, too."""
    from vllm.v1.core.sched.output import CachedRequestData

    cached = CachedRequestData(
        req_ids=["goes on", "fresh", "begun"],
        resumed_req_ids=set(),
        new_token_ids=[],
        all_token_ids={},
        new_block_ids=[None, ([9],), None],
        num_computed_tokens=[24, 16, 16],
        num_output_tokens=[5, 0, 2],
    )
    return SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=cached)


def vllm(*, uses_mrope: bool = False, stages: int = 1) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(uses_mrope=uses_mrope),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
    )


def test_to_the_first_runner_who_went_back_is_resumed() -> None:
    from kvortex.connector.first_runner import FirstRunner

    output, fresh = scheduled(), went_back("fresh", [1, 2, 9], [])
    begun, absent = went_back("begun", [3, 4], [70, 71]), went_back("absent", [5], [])
    FirstRunner(vllm()).hand_over(output, [absent, begun, fresh])
    expected = scheduled().scheduled_cached_reqs
    expected.resumed_req_ids = {"fresh", "begun"}
    expected.all_token_ids = {"fresh": list(range(20)), "begun": [*range(20), 70, 71]}
    expected.new_block_ids = [None, ([1, 2, 9],), ([3, 4],)]
    assert output.scheduled_cached_reqs == expected
    assert output.scheduled_new_reqs == []
    output.scheduled_cached_reqs.new_block_ids[2][0].append(10)  # as a runner in this process does
    assert begun.block_ids == [[3, 4]]


@pytest.mark.parametrize("why", ["pipeline", "image"])
def test_who_would_not_do_resumed_is_new_to_the_first_runner(why: str) -> None:
    from kvortex.connector.first_runner import FirstRunner

    output, fresh = scheduled(), went_back("fresh", [1, 2, 9], [])
    begun, absent = went_back("begun", [3, 4], [70, 71]), went_back("absent", [5], [])
    if why == "image":
        fresh.request.mm_features = [pixels := image(10, 5)]
    runner = FirstRunner(vllm(stages=1 + (why == "pipeline")))
    runner.hand_over(output, [absent, begun, fresh])
    (new,), cached = output.scheduled_new_reqs, output.scheduled_cached_reqs
    assert why != "image" or new.mm_features == [pixels]
    assert (new.req_id, new.num_computed_tokens, new.block_ids) == ("fresh", 16, ([1, 2, 9],))
    assert (new.prompt_token_ids, new.prefill_token_ids) == (list(range(20)), None)
    assert cached.req_ids == ["goes on", "begun"]
    assert cached.resumed_req_ids == {"begun"}
    assert cached.all_token_ids == {"begun": [*range(20), 70, 71]}
    assert cached.new_block_ids == [None, ([3, 4],)]
    assert (cached.num_computed_tokens, cached.num_output_tokens) == ([24, 16], [5, 2])
    new.block_ids[0].append(10)  # as a runner in this process does
    cached.new_block_ids[1][0].append(10)
    assert (fresh.block_ids, begun.block_ids) == ([[1, 2, 9]], [[3, 4]])


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_a_runner_that_sees_for_itself_is_told_nothing(
    *, second: bool, ahead: bool, images: bool
) -> None:
    from kvortex.connector.connector import _runner_to_tell

    config = vllm()
    config.use_v2_model_runner = second
    config.scheduler_config = SimpleNamespace(async_scheduling=ahead)
    config.model_config.is_multimodal_model = images
    told = type(_runner_to_tell(config)).__name__
    assert told == ("SecondRunner" if second else "FirstRunner" if ahead or images else "NoneType")


def test_to_the_second_runner_all_who_went_back_are_new() -> None:
    from kvortex.connector.second_runner import SecondRunner

    output, fresh = scheduled(), went_back("fresh", [1, 2, 9], [])
    begun = went_back("begun", [3, 4], [70, 71])
    SecondRunner(vllm(uses_mrope=True)).hand_over(output, [begun, fresh])
    new = {one.req_id: one for one in output.scheduled_new_reqs}
    assert new["fresh"].block_ids == ([1, 2, 9],)
    assert new["fresh"].prefill_token_ids == list(range(20))
    assert new["begun"].block_ids == ([3, 4],)
    assert new["begun"].prefill_token_ids == [*range(20), 70, 71]
    assert output.scheduled_cached_reqs.req_ids == ["goes on"]


def test_a_step_without_who_went_back_is_left_as_it_is() -> None:
    from kvortex.connector.first_runner import FirstRunner

    output = scheduled()
    FirstRunner(vllm()).hand_over(output, [went_back("absent", [5], [])])
    assert output == scheduled()


def test_a_failed_window_is_told_by_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would begin again at the failed block, of which the window's tokens are gone."""
    monkeypatch.setattr("kvortex.connector.geometry.CAN_NAME_REQUESTS", True)
    assert filled(side(Reach(window=32)), request(160)).match(request(160), 0) == (144, True)


def test_a_reset_ends_with_what_was_computed_before() -> None:
    keeper, asked = side(), request(96)
    keeper.bind_gpu_block_pool(Pool(16))
    keeper.match(asked, 0)
    allocated(keeper, asked, [1, 2, 3, 4, 5, 6], 0)
    keeper.reset()
    assert planned(keeper, asked, 0, 96) == []
    keeper.match(asked, 0)
    allocated(keeper, asked, [1, 2, 3, 4, 5, 6], 0)  # it was preempted, and begins anew
    assert planned(keeper, asked, 0, 96) == [1, 2, 3, 4, 5, 6]


def test_events_tell_what_came_and_what_left() -> None:
    from vllm.distributed.kv_events import BlockRemoved, BlockStored
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    keeper, asked = side(), request(48)
    hashes = [maybe_convert_block_hash(block_hash) for block_hash in asked.block_hashes]
    events = keeper.tell_events()
    filled(keeper, asked)
    (stored,) = events.take()
    assert isinstance(stored, BlockStored)
    assert sorted(stored.block_hashes) == sorted(hashes)
    assert (stored.medium, stored.block_size, stored.group_idx) == ("CPU", BLOCK, 0)
    keeper.reset()
    (removed,) = events.take()
    assert isinstance(removed, BlockRemoved)
    assert sorted(removed.block_hashes) == sorted(hashes)
    assert removed.medium == "CPU"
    assert events.take() == []


def test_each_block_follows_the_one_before() -> None:
    tracked = side()._tracked.of(request(64))
    keys = tracked.keys(0, 0, 4)
    assert tracked.parents(0, 0, 4) == [None, *keys[:3]]
    assert tracked.parents(0, 2, 4) == keys[1:3]
