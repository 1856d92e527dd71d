"""A real vLLM over two ranks, each a process with a pool, and a disk, of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("vllm")

from engines import answers, connector, counters, prompts, reset_gpu, running, whole_blocks

from kvortex import KVortexConfig

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

LENGTHS = [700, 130, 64, 33]


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")
def test_a_block_comes_back_to_all_ranks(
    tiny_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By tensor parallelism: vLLM's CPU build computes nothing by a pipeline."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM wants a NUMA node for each
    asked = prompts(LENGTHS)
    config = KVortexConfig(
        ram_pool_gb=0.05,
        disk_path=str(tmp_path),
        disk_pool_gb=0.1,
        admission="always",
        load="always",
    )
    settings = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    settings["kv_transfer_config"] = config.kv_transfer_config()
    with running(tiny_model, None, **settings) as llm:
        first, _ = answers(llm, asked)
        reset_gpu(llm)
        again, cached = answers(llm, asked)
        assert again == first
        assert cached == whole_blocks(LENGTHS)
        blocks = sum(cached) // 32
        assert counters(llm)["loaded_blocks"] == blocks
        assert counters(llm)["failed_loads"] == counters(llm)["failed_stores"] == 0
        assert connector(llm)._scheduler.offload.tier.index.resident >= blocks
    ranks = sorted(folder.name for folder in tmp_path.glob("*/rank-*"))
    assert ranks == ["rank-0", "rank-1"]
    assert capfd.readouterr().out.count("KVortex: 0.025 GiB of host RAM hold") == 2
