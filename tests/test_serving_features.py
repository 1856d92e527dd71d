"""Ways to run vLLM that change what a connector sees; answers stay what they were."""

from __future__ import annotations

from typing import Any

import pytest
from engines import answers, connector, prompts, running, whole_blocks

from kvortex import KVortexConfig

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

LENGTHS = [64, 97, 333, 1000]
TOKENS = 16


@pytest.fixture(scope="module")
def expected(tiny_model: str) -> list[list[int]]:
    """The outputs of a vLLM without KVortex."""
    with running(tiny_model, None) as llm:
        return answers(llm, prompts(LENGTHS), TOKENS)[0]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"scheduling_policy": "priority"}, id="priorities"),
        pytest.param({"async_scheduling": True}, id="asynchronous scheduling"),
        pytest.param({"async_scheduling": False}, id="synchronous scheduling"),
    ],
)
def test_answers_stay_as_they_were(
    tiny_model: str, expected: list[list[int]], settings: dict[str, Any]
) -> None:
    asked = prompts(LENGTHS)
    with running(tiny_model, 0.5, **settings) as llm:
        assert answers(llm, asked, TOKENS)[0] == expected
        assert llm.reset_prefix_cache()
        restored, cached = answers(llm, asked, TOKENS)
        assert restored == expected
        assert cached == whole_blocks(LENGTHS)
        assert connector(llm)._scheduler.offload.pending is False


def test_as_a_child_of_multi_connector(tiny_model: str, expected: list[list[int]]) -> None:
    asked = prompts(LENGTHS)
    children = [KVortexConfig(ram_pool_gb=size).kv_transfer_config() for size in (0.3, 0.2)]
    several = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": children},
    }
    with running(tiny_model, None, kv_transfer_config=several) as llm:
        assert answers(llm, asked, TOKENS)[0] == expected
        assert llm.reset_prefix_cache()
        restored, cached = answers(llm, asked, TOKENS)
        assert restored == expected
        assert cached == whole_blocks(LENGTHS)
        first, second = (child._scheduler.offload for child in connector(llm)._connectors)
        assert first.counters.stored_blocks == second.counters.stored_blocks > 0
        assert (first.counters.loaded_blocks > 0, second.counters.loaded_blocks) == (True, 0)


def test_kv_events_name_host_memory(tiny_model: str) -> None:
    from vllm.config import KVEventsConfig

    told = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    with running(tiny_model, 0.5, kv_events_config=told) as llm:
        side = connector(llm)
        taken: list[Any] = []
        take = side.take_events

        def noted() -> list[Any]:
            events = list(take())
            taken.extend(events)
            return events

        side.take_events = noted
        answers(llm, prompts([333]), TOKENS)
        assert llm.reset_prefix_cache(reset_connector=True)
        answers(llm, prompts([64], seed=1), TOKENS)
    names = [(type(event).__name__, len(event.block_hashes)) for event in taken]
    assert ("BlockRemoved", 10) in names
    assert sum(n for name, n in names if name == "BlockStored") == 10 + 2
