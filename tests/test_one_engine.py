"""One real vLLM in this process, asked by test after test: what it restores and what it forgets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from engines import (
    BLOCK,
    LENGTHS,
    answers,
    compares_nothing,
    connector,
    counters,
    fail_copies,
    prompts,
    reset_gpu,
    running,
    whole_blocks,
    worker_of_this_process,
)

from kvortex.core import Direction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def engine(tiny_model: str, expected: list[list[int]]) -> Iterator[Any]:
    """`expected` comes from another one, and there can be only one in a process."""
    with running(tiny_model, 0.5) as llm:
        yield llm


@pytest.fixture
def llm(engine: Any) -> Any:
    """With nothing in it of the test before."""
    reset_gpu(engine, reset_connector=True)
    return engine


@pytest.fixture
def counted(llm: Any) -> Callable[[str], float]:
    """How far a counter went in this test."""
    before = counters(llm)
    return lambda name: counters(llm)[name] - before[name]


def test_every_whole_block_comes_back_and_output_is_equal(
    llm: Any, expected: list[list[int]], counted: Callable[[str], float]
) -> None:
    asked = prompts(LENGTHS)
    cold, _ = answers(llm, asked)
    reset_gpu(llm)
    restored, cached = answers(llm, asked)
    assert cold == expected
    assert restored == expected
    assert cached == whole_blocks(LENGTHS)
    assert counted("loaded_blocks") * BLOCK == sum(whole_blocks(LENGTHS))
    assert connector(llm)._scheduler.offload.pending is False
    connector(llm)._scheduler.offload.tier.index.check()


def test_also_where_a_prompt_comes_alone(llm: Any, expected: list[list[int]]) -> None:
    for prompt, output, whole in list(
        zip(prompts(LENGTHS), expected, whole_blocks(LENGTHS), strict=True)
    )[::7]:
        assert answers(llm, [prompt]) == ([output], [0])
        reset_gpu(llm)
        assert answers(llm, [prompt]) == ([output], [whole])


def test_wrong_bytes_change_the_output(
    llm: Any, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: were the bytes not what they should be, the tests above would notice."""
    asked = prompts(LENGTHS)[::3]
    answers(llm, asked)
    compares_nothing(monkeypatch)
    worker_of_this_process()._copy_engine.pool.bytes.zero_()
    llm.reset_prefix_cache()
    assert answers(llm, asked)[0] != expected[::3]


def test_generated_blocks_come_back(llm: Any) -> None:
    (prompt,) = prompts([100], seed=1)
    (answer,), _ = answers(llm, [prompt], tokens=100)
    llm.reset_prefix_cache()
    follow_up = {"prompt_token_ids": prompt["prompt_token_ids"] + answer + [7] * 9}
    _, (cached,) = answers(llm, [follow_up])
    assert cached == 199 // BLOCK * BLOCK  # the last token of an answer is never computed


def test_reset_connector_forgets_everything(llm: Any, expected: list[list[int]]) -> None:
    asked = prompts(LENGTHS)[::3]
    answers(llm, asked)
    assert llm.reset_prefix_cache(reset_connector=True)
    again, cached = answers(llm, asked)
    assert again == expected[::3]
    assert sum(cached) == 0


def test_long_loads_wait_apart_from_running_requests(
    llm: Any,
    expected: list[list[int]],
    counted: Callable[[str], float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = prompts(LENGTHS)
    answers(llm, asked)
    costs = connector(llm)._scheduler.costs
    monkeypatch.setattr(type(costs), "pauses", lambda *_: True)
    reset_gpu(llm)
    restored, cached = answers(llm, asked)
    assert restored == expected
    assert cached == whole_blocks(LENGTHS)
    assert counted("apart_loads") > 0
    assert connector(llm)._scheduler.offload.pending is False


def test_a_load_apart_that_fails_is_computed_again(
    llm: Any,
    expected: list[list[int]],
    counted: Callable[[str], float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = prompts(LENGTHS)
    answers(llm, asked)
    side = connector(llm)._scheduler
    monkeypatch.setattr(type(side.costs), "pauses", lambda *_: True)
    monkeypatch.setattr(side._turns, "running", 1)
    fail_copies(monkeypatch, Direction.LOAD, lambda ids, *_: len(ids) % 2 == 1)
    reset_gpu(llm)
    assert answers(llm, asked)[0] == expected
    assert counted("failed_loads") > 0
    assert counted("loaded_blocks") > 0
    assert connector(llm)._scheduler.offload.pending is False


def test_salted_prompts_share_nothing(llm: Any) -> None:
    for salt, hit in (("a", 0), ("b", 0), ("a", 992)):
        asked = [prompt | {"cache_salt": salt} for prompt in prompts([1000])]
        assert llm.reset_prefix_cache()
        assert answers(llm, asked, tokens=16)[1] == [hit]


def test_a_client_can_leave_a_request_alone(llm: Any, counted: Callable[[str], float]) -> None:
    from vllm import SamplingParams

    def cached(params: dict[str, int]) -> int:
        assert llm.reset_prefix_cache()
        sampling = SamplingParams(
            max_tokens=1, temperature=0, extra_args={"kv_transfer_params": params}
        )
        return int(llm.generate(prompts([1000]), sampling, use_tqdm=False)[0].num_cached_tokens)

    assert cached({"max_offload_tokens": 0}) == 0
    assert counted("stored_blocks") == 0
    assert cached({"max_offload_tokens": 500}) == 0
    assert counted("stored_blocks") == 500 // BLOCK
    assert cached({"max_load_tokens": 0}) == 0
    assert cached({"max_load_tokens": 100}) == 96
    assert cached({}) == 992
