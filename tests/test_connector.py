"""A real vLLM in this process: what it restores, and that its greedy output is the same."""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engines import (
    BLOCK,
    LENGTHS,
    answers,
    connector,
    counters,
    fail_copies,
    prompts,
    reset_gpu,
    running,
    whole_blocks,
    worker_of_this_process,
)

from kvortex import KVortexConfig
from kvortex.core import ConfigError, Direction

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("vllm")
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {"max_num_batched_tokens": 256, "enable_chunked_prefill": True}, id="chunked-prefill"
        ),
        pytest.param({"enforce_eager": False}, id="cuda-graphs", marks=[pytest.mark.gpu, NO_CUDA]),
    ],
)
def test_every_whole_block_comes_back_and_output_is_equal(
    tiny_model: str, expected: list[list[int]], settings: dict[str, Any]
) -> None:
    with running(tiny_model, 0.5, **settings) as llm:
        asked = prompts(LENGTHS)
        cold, _ = answers(llm, asked)
        reset_gpu(llm)
        restored, cached = answers(llm, asked)
        assert cold == expected
        assert restored == expected
        assert cached == whole_blocks(LENGTHS)
        assert counters(llm)["loaded_blocks"] * BLOCK == sum(whole_blocks(LENGTHS))
        assert connector(llm)._scheduler.offload.pending is False
        connector(llm)._scheduler.offload.tier.index.check()


@pytest.mark.parametrize("runner", ["0", pytest.param("1", marks=[pytest.mark.gpu, NO_CUDA])])
@pytest.mark.parametrize("waiting", ["whole", "layers", "apart"])
def test_flipped_bits_cost_time_only(
    tiny_model: str,
    expected: list[list[int]],
    runner: str,
    waiting: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In host memory, while conversations return: every answer is right, and each is counted."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setattr("kvortex.layout.LEAST_PART_BYTES", 1)  # each layer is a part
    if torch.cuda.is_available():
        monkeypatch.setattr("kvortex.cuda_copy_engine.LAUNCH_BYTES", 1)
    draw, flipped = random.Random(7), 0
    some, tokens = slice(7, None, 3), 12
    asked = prompts(LENGTHS)[some]
    right = [output[:tokens] for output in expected[some]]
    with running(tiny_model, 0.5) as llm:
        side = connector(llm)._scheduler
        monkeypatch.setattr(type(side.costs), "hides", lambda *_: waiting == "layers")
        if waiting == "apart":
            monkeypatch.setattr(type(side.costs), "pauses", lambda *_: True)
            side._turns.running = 1
        index, pool = side.offload.tier.index, worker_of_this_process()._copy_engine.pool
        load, loaded = side.offload.load, set[bytes]()

        def noted(keys: Any, *where: Any) -> Any:
            loaded.update(keys)
            return load(keys, *where)

        monkeypatch.setattr(side.offload, "load", noted)
        for _ in range(2):
            assert answers(llm, asked, tokens)[0] == right
            reset_gpu(llm)
        for _ in range(3):
            for key in draw.sample(sorted(loaded), 3):
                slot, bit = index.get(key).slot, 1 << draw.randrange(8)
                pool.bytes[slot, draw.randrange(pool.slot_bytes)] ^= bit
            assert answers(llm, asked, tokens)[0] == right
            flipped += 3
            reset_gpu(llm)
            assert counters(llm)["corrupt_blocks"] == index.quarantined == flipped
        assert answers(llm, asked, tokens) == (right, whole_blocks(LENGTHS[some]))
        index.check()
        counted = counters(llm)
        assert bool(counted["layered_loads"]) == (waiting == "layers")
        assert bool(counted["apart_loads"]) == (waiting == "apart")


def test_equal_under_preemption(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [300 + 11 * i for i in range(8)]
    asked = prompts(lengths, seed=2)
    with running(tiny_model, None) as llm:
        alone = [answers(llm, [prompt], tokens=80)[0][0] for prompt in asked]
    tight = {"num_gpu_blocks_override": 64, "max_model_len": 1024, "max_num_seqs": 16}
    preemptions: list[Any] = []
    with running(tiny_model, 0.5, **tight) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request

        def counted(*request: Any, **how: Any) -> None:
            preemptions.append(request)
            preempt(*request, **how)

        monkeypatch.setattr(scheduler, "_preempt_request", counted)
        for _ in range(2):
            assert answers(llm, asked, tokens=80)[0] == alone
            reset_gpu(llm)
        assert preemptions
        assert counters(llm)["loaded_blocks"] > 0
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == 63  # no reference is left; one is the null block


def test_equal_when_the_host_pool_is_too_small(tiny_model: str, expected: list[list[int]]) -> None:
    with running(tiny_model, 0.004) as llm:
        asked = prompts(LENGTHS)
        for _ in range(2):
            assert answers(llm, asked)[0] == expected
            reset_gpu(llm)
        assert connector(llm)._scheduler.offload.tier.evictions > 0
        connector(llm)._scheduler.offload.tier.index.check()


@pytest.mark.parametrize("broken", [Direction.LOAD, Direction.STORE])
def test_a_failing_copy_costs_time_only(
    tiny_model: str, expected: list[list[int]], broken: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM computes again after a failed load only here: with asynchronous scheduling it keeps a
    # token of the step after, and its second model runner does not go back to the failed block.
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with running(tiny_model, 0.5, async_scheduling=False) as llm:
        asked = prompts(LENGTHS)
        calls = 0

        def every_second(*_: Any) -> bool:
            nonlocal calls
            calls += 1
            return calls % 2 == 1

        fail_copies(monkeypatch, broken, every_second)
        for _ in range(4):
            assert answers(llm, asked)[0] == expected
            reset_gpu(llm)
        assert counters(llm)[f"failed_{broken.value}s"] > 0
        connector(llm)._scheduler.offload.tier.index.check()


@pytest.mark.gpu
@NO_CUDA
def test_a_load_that_cannot_be_launched_is_copied_slowly(
    tiny_model: str, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny_model, 0.5) as llm:
        asked = prompts(LENGTHS)
        answers(llm, asked)
        reset_gpu(llm)

        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("made to fail")

        monkeypatch.setattr("kvortex.paged_kernel.PagedKernel.launch", broken)
        assert answers(llm, asked) == (expected, whole_blocks(LENGTHS))
        assert counters(llm)["failed_loads"] == 0
        assert counters(llm)["loaded_blocks"] * BLOCK == sum(whole_blocks(LENGTHS))


def test_aborted_requests_leave_nothing_behind(tiny_model: str, expected: list[list[int]]) -> None:
    from vllm import SamplingParams

    with running(tiny_model, 0.5, max_num_batched_tokens=128) as llm:
        engine, asked = llm.llm_engine, prompts(LENGTHS)
        for rounds in range(1, 6):
            ids = [
                engine.add_request(f"{rounds}-{i}", prompt, SamplingParams(max_tokens=40))
                for i, prompt in enumerate(asked)
            ]
            for _ in range(rounds):
                engine.step()
            engine.abort_request(
                [i if isinstance(i, str) else f"{rounds}-{n}" for n, i in enumerate(ids)]
            )
        while engine.has_unfinished_requests():
            engine.step()
        assert answers(llm, asked)[0] == expected
        reset_gpu(llm)
        assert answers(llm, asked) == (expected, whole_blocks(LENGTHS))
        assert len(connector(llm)._scheduler._tracked) == 0


def test_shutdown_gives_the_pool_back(tiny_model: str) -> None:
    with running(tiny_model, 0.5):
        pool = worker_of_this_process()._copy_engine.pool
        assert pool.bytes.numel() > 0
    assert pool.bytes.numel() == 0


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"ram_pool": 1}, ["ram_pool=1", "ram_pool_gb"]),
        ({"num_cuda_streams": 0}, ["num_cuda_streams=0", "1"]),
        ({"eviction_policy": "mru"}, ["eviction_policy='mru'", "lru_freq"]),
        ({"ram_pool_gb": 60000}, ["ram_pool_gb=60000", "free RAM", "use at most"]),
    ],
)
def test_bad_configuration_is_refused_in_one_line(extra: dict[str, Any], words: list[str]) -> None:
    from kvortex.connector import KVortexConnector

    with pytest.raises(ConfigError) as caught:
        KVortexConnector.requires_piecewise_for_cudagraph(extra)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_bad_configuration_stops_a_server_that_captures_no_graphs(tiny_model: str) -> None:
    bad = KVortexConfig().kv_transfer_config() | {"kv_connector_extra_config": {"ram_pool": 1}}
    with (
        pytest.raises(ConfigError, match="ram_pool=1"),
        running(tiny_model, None, kv_transfer_config=bad),
    ):
        pass


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
def test_a_role_that_stores_or_loads_only_is_refused(tiny_model: str, role: str) -> None:
    one_way = KVortexConfig(ram_pool_gb=0.1).kv_transfer_config() | {"kv_role": role}
    words = f"kv_role='{role}': KVortex stores and loads; write kv_role='kv_both'"
    with (
        pytest.raises(ConfigError, match=words),
        running(tiny_model, None, kv_transfer_config=one_way),
    ):
        pass


class Kept(logging.Handler):
    """Lines of one logger, each as often as it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_what_a_request_asks_in_vain_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvortex.connector import request_params

    kept, told = Kept(), set[str]()
    monkeypatch.setattr(request_params, "_told", told)
    monkeypatch.setattr(request_params.logger, "handlers", [kept])
    for _ in range(3):
        asked = {"max_loaded_tokens": 3, "max_load_tokens": 5, "explain": "maybe"}
        assert request_params.RequestParams.of(asked).max_load_tokens == 5
        request_params.RequestParams.of([])
    assert kept.lines == [
        "explain='maybe' is ignored: it must be true or false",
        "kv_transfer_params: 'max_loaded_tokens' is ignored; KVortex knows max_load_tokens, "
        "max_offload_tokens, explain",
        "kv_transfer_params=[] is ignored: it must be an object",
    ]
    for number in range(100):
        request_params.RequestParams.of({f"name {number}": 1})
    assert len(kept.lines) == len(told) == request_params.MOST_TOLD


def test_unsupported_caches_are_named() -> None:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        MambaSpec,
        SlidingWindowSpec,
    )

    from kvortex.connector.geometry import unsupported

    shape = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    full = FullAttentionSpec(**shape, block_size=32)
    window = SlidingWindowSpec(**shape, block_size=32, sliding_window=64)
    wide = SlidingWindowSpec(**shape, block_size=64, sliding_window=64)
    state = MambaSpec(block_size=32, shapes=((2, 2),), dtypes=(torch.float32,))
    vllm = VllmConfig()
    vllm.cache_config.block_size = 32

    def why_not(*specs: Any) -> str | None:
        groups = [KVCacheGroupSpec([str(number)], spec) for number, spec in enumerate(specs)]
        reason: str | None = unsupported(vllm, KVCacheConfig(8, [], groups))
        return reason

    assert why_not(full) is why_not(window) is why_not(full, window) is None
    assert "no KV cache" in str(why_not())
    assert "MambaSpec" in str(why_not(full, state))
    assert "different sizes, [32, 64]" in str(why_not(full, wide))


def test_both_sides_count_slots_alike_where_layers_differ() -> None:
    """vLLM tells the scheduler the specification of the first layer only."""
    from vllm.config import VllmConfig
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheGroupSpec,
        UniformTypeKVCacheSpecs,
    )

    from kvortex.connector.geometry import geometry_of, unsupported

    if not hasattr(kv_cache_utils, "get_kv_cache_config_from_groups"):
        pytest.skip("this vLLM makes its tensors by other functions")
    shape = {"block_size": 32, "head_size": 8, "dtype": torch.float32}
    layers = {f"{heads}": FullAttentionSpec(**shape, num_kv_heads=heads) for heads in (1, 2, 5)}
    group = KVCacheGroupSpec(list(layers), UniformTypeKVCacheSpecs(32, layers))
    vllm = VllmConfig()
    vllm.cache_config.block_size = 32
    if hasattr(vllm.cache_config, "kv_cache_layout"):  # else vLLM's engine chooses it at start
        vllm.cache_config.kv_cache_layout = "LBNHC"
    block_bytes = (1 + 2 + 5) * 32 * 8 * 4 * 2
    of_worker = kv_cache_utils.get_kv_cache_config_from_groups(vllm, [group], 7 * block_bytes)
    of_scheduler = kv_cache_utils.generate_scheduler_kv_cache_config([of_worker])
    assert type(of_scheduler.kv_cache_groups[0].kv_cache_spec) is FullAttentionSpec
    sides = [geometry_of(vllm, of) for of in (of_worker, of_scheduler)]
    assert sides[0] == sides[1]
    assert (sides[0].num_gpu_blocks, sides[0].slot_bytes) == (7, block_bytes)
    assert unsupported(vllm, of_worker) is unsupported(vllm, of_scheduler) is None


def extended(asked: list[dict[str, list[int]]], more: int) -> list[dict[str, list[int]]]:
    """Each prompt with as many new tokens behind it."""
    ends = prompts([more] * len(asked), seed=1)
    return [
        {"prompt_token_ids": one["prompt_token_ids"] + end["prompt_token_ids"]}
        for one, end in zip(asked, ends, strict=True)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="eager"),
        pytest.param({"enforce_eager": False}, id="cuda-graphs", marks=[pytest.mark.gpu, NO_CUDA]),
    ],
)
def test_layers_wait_for_their_own_part_where_much_is_computed(
    tiny_model: str, settings: dict[str, Any]
) -> None:
    halves = prompts([512, 777, 1000])
    whole = extended(halves, 500)
    with running(tiny_model, None, **settings) as llm:
        expected = answers(llm, whole)[0]
    with running(tiny_model, 0.5, **settings) as llm:
        answers(llm, halves)
        for _ in range(3):
            reset_gpu(llm)
            restored, cached = answers(llm, whole)
            assert restored == expected
            assert min(cached) > 0
        counted = counters(llm)
        assert counted["layered_loads"] > 0
        assert counted["unwaited_layers"] == counted["apart_loads"] == 0


def test_sleep_is_refused_where_vllm_does_not_tell_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from types import SimpleNamespace

    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1 as base

    from kvortex.connector import connector as module

    vllm: Any = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True))
    if hasattr(base, "unregister_kv_caches"):
        module._require_news_of_sleep(vllm)
        monkeypatch.delattr(base, "unregister_kv_caches")
    with pytest.raises(ConfigError, match="turn it off"):
        module._require_news_of_sleep(vllm)
    vllm.model_config.enable_sleep_mode = False
    module._require_news_of_sleep(vllm)


def test_speed_of_prefill_is_what_a_clock_says(tiny_model: str) -> None:
    """Also with steps between that compute nothing, and wait for stores or loads only."""
    with running(tiny_model, 0.5, max_num_seqs=1) as llm:
        answers(llm, prompts([2000]), tokens=1)
        speeds = []
        for seed in range(1, 6):
            asked = prompts([2000], seed)
            began = time.perf_counter()
            answers(llm, asked, tokens=1)
            speeds.append(2000 / (time.perf_counter() - began))
            reset_gpu(llm)
            answers(llm, asked, tokens=1)
        learnt = connector(llm)._scheduler.costs.prefill_tokens_per_s
        assert min(speeds) * 0.7 < learnt < max(speeds) * 3


def test_a_trace_is_recorded_and_can_be_replayed(tiny_model: str, tmp_path: Path) -> None:
    from kvortex.simulator import replay
    from kvortex.trace import read_trace

    path = tmp_path / "trace.gz"
    config = KVortexConfig(ram_pool_gb=0.5, load="always", trace_path=str(path))
    with running(tiny_model, None, kv_transfer_config=config.kv_transfer_config()) as llm:
        asked = prompts([1000, 333])
        answers(llm, asked, tokens=1)
        reset_gpu(llm)
        answers(llm, asked, tokens=1)
        connector(llm).shutdown()
    trace = read_trace(path)
    whole = [request for request in trace.requests if request.tokens >= BLOCK]  # see `reset_gpu`
    assert [request.tokens for request in whole] == [1000, 333] * 2
    assert trace.distinct_blocks() == 1000 // BLOCK + 333 // BLOCK
    served = [request.hits for request in whole]
    assert served[2:] == [{"gpu": 0, "host": 31}, {"gpu": 0, "host": 10}]
    assert replay(trace, "lru", 100, "always").block_hit_rate == 0.5
