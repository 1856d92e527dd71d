"""A real vLLM whose KV blocks overflow to disk, and find their way back, also in a second life."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")

from engines import answers, counters, prompts, running, whole_blocks

from kvortex import KVortexConfig
from kvortex.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

LENGTHS = [1500, 1100, 1300, 900]
FEW_BLOCKS = 60
"""In the GPU's cache and in host RAM; the prompts have 150."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder)
    return str(folder)


def with_disk(folder: Path, **settings: Any) -> dict[str, Any]:
    """Settings of an engine with little memory and a disk."""
    own = {"ram_pool_gb": 0.016, "admission": "always", "load": "always", "disk_pool_gb": 0.25}
    config = KVortexConfig(**own | {"disk_path": str(folder)} | settings)
    return {
        "num_gpu_blocks_override": FEW_BLOCKS,
        "max_model_len": 1700,
        "kv_transfer_config": config.kv_transfer_config(),
    }


def settled(llm: Any) -> dict[str, float]:
    """Counters once nothing is under way any more."""
    engine = llm.llm_engine
    for _ in range(10_000):
        if not engine.engine_core.engine_core.scheduler.connector.has_pending_push_work():
            return counters(llm)
        engine.step()
    raise AssertionError("the disk does not come to rest")


def test_what_left_the_host_comes_back_from_disk_and_is_there_after_a_restart(
    model: str, tmp_path: Path
) -> None:
    asked = prompts(LENGTHS)
    with running(model, None) as llm:
        right = [answers(llm, [one])[0][0] for one in asked]
    with running(model, None, **with_disk(tmp_path)) as llm:
        for _ in range(2):
            for one, expected in zip(asked, right, strict=True):
                assert answers(llm, [one])[0] == [expected]
                settled(llm)
        first = counters(llm)
        assert first["disk_written_blocks"] > FEW_BLOCKS
        assert first["disk_read_blocks"] > FEW_BLOCKS
        assert first["disk_failed_reads"] == first["disk_late_reads"] == 0
    with running(model, None, **with_disk(tmp_path)) as llm:
        outputs, cached = answers(llm, [asked[0]])
        assert outputs == [right[0]]
        assert cached == whole_blocks(LENGTHS[:1])
        second = settled(llm)
        assert second["disk_survivors"] > 2 * FEW_BLOCKS
        assert second["disk_hit_tokens"] == cached[0]
