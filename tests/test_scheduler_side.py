"""What the scheduler side answers vLLM, on the real classes but without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvortex import KVortexConfig
from kvortex.core import ConfigError, DiskReport, StepReport
from kvortex.prefix_match import Reach

if TYPE_CHECKING:
    from collections.abc import Container

    from kvortex.connector.scheduler_side import SchedulerSide

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

BLOCK = 16
SLOT_BYTES = 1 << 20


def side(*reaches: Reach, **settings: Any) -> SchedulerSide:
    from kvortex.connector.geometry import Geometry
    from kvortex.connector.scheduler_side import SchedulerSide

    geometry = Geometry(("a",), reaches or (Reach(),), 4096, BLOCK, SLOT_BYTES, 1)
    config = KVortexConfig(ram_pool_gb=4, **settings)
    return SchedulerSide(config, geometry)


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
    keys = [key for g in groups for key in keeper._track(asked).keys(g, 0, len(asked.block_hashes))]
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
    keeper._loads.running = 1
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


def test_a_thousand_blocks_are_looked_up_quickly(benchmark: Any) -> None:
    """The request's keys are made once, when it is first seen."""
    asked = request(16_016)
    keeper = filled(side(), asked)
    assert benchmark(lambda: keeper.match(asked, 0)) == (16_000, False)


def test_keys_are_vllms_own() -> None:
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

    asked = request(48)
    own = [make_block_hash_with_group_id(BlockHash(h), 1) for h in asked.block_hashes]
    assert side(Reach(), Reach())._track(asked).keys(1, 0, 3) == own


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


def test_blocks_behind_a_window_belong_to_others() -> None:
    """vLLM does not say that it took them; a failed load has every block considered again."""
    keeper, asked = side(Reach(window=32)), request(96)
    keeper.bind_gpu_block_pool(Pool(16))
    keeper.match(asked, 0)
    allocated(keeper, asked, [1, 2, 3, 4, 5, 6], 0)
    assert planned(keeper, asked, 0, 64) == [1, 2, 3, 4]
    keeper.offload.settle(StepReport({0: 1}, failed=frozenset({0})))
    keeper._store_again()
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
    tracked = side()._track(request(64))
    keys = tracked.keys(0, 0, 4)
    assert tracked.parents(0, 0, 4) == [None, *keys[:3]]
    assert tracked.parents(0, 2, 4) == keys[1:3]
