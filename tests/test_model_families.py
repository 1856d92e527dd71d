"""Models with other KV caches than a Llama's, in a real vLLM: what comes back is what was there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
from engines import (
    answers,
    compares_nothing,
    connector,
    counters,
    fail_copies,
    prompts,
    reset_gpu,
    running,
    worker_of_this_process,
)

from kvortex.core import Direction

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

LENGTHS = [31, 64, 97, 150, 333, 512, 1000, 1500]
FEW = [64, 333, 1000]
ALONE = {"max_num_seqs": 1, "skip_tokenizer_init": True}
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def twice(llm: Any, *, reset: bool) -> tuple[list[list[int]], list[int]]:
    """Outputs and cached tokens of prompts that return."""
    answers(llm, prompts(FEW), tokens=8)
    if reset:
        reset_gpu(llm)
    return answers(llm, prompts(FEW), tokens=8)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        pytest.param(models.window_hybrid, {}, id="window hybrid"),
        pytest.param(models.mla, {"dtype": "bfloat16"}, id="MLA", marks=[pytest.mark.gpu, NO_CUDA]),
        pytest.param(models.llama, {"kv_cache_dtype": "fp8"}, id="fp8", marks=models.NO_FP8),
    ],
)
def test_a_host_hit_answers_as_vllms_own_prefix_hit(
    make: Callable[[Path], None], settings: dict[str, Any], tmp_path: Path
) -> None:
    make(tmp_path)
    with running(str(tmp_path), None, **ALONE | settings) as llm:
        expected, on_gpu = twice(llm, reset=False)
    with running(str(tmp_path), 0.5, **ALONE | settings) as llm:
        restored, cached = twice(llm, reset=True)
        assert restored == expected
        assert cached == on_gpu
        assert counters(llm)["loaded_blocks"] > 0
        connector(llm)._scheduler.offload.tier.index.check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM caches MLA's prefixes on GPUs")
def test_nothing_is_loaded_where_vllm_caches_no_prefix(tmp_path: Path) -> None:
    """vLLM's MLA on CPUs computes wrong tokens behind a prefix, wherever that comes from."""
    models.mla(tmp_path)
    with running(str(tmp_path), 0.5, **ALONE) as llm:
        assert connector(llm)._scheduler is None
        restored, cached = twice(llm, reset=True)
        assert cached == [0] * len(FEW)
        assert restored == twice(llm, reset=True)[0]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    """Folder of a model with two KV cache groups, and its outputs without KVortex."""
    folder = tmp_path_factory.mktemp("hybrid")
    models.window_hybrid(folder)
    with running(str(folder), None, skip_tokenizer_init=True) as llm:
        return str(folder), answers(llm, prompts(LENGTHS))[0]


def test_a_window_is_loaded_no_further_back_than_it_reaches(
    hybrid: tuple[str, list[list[int]]],
) -> None:
    model, expected = hybrid
    with running(model, 0.5, skip_tokenizer_init=True) as llm:
        answers(llm, prompts([1500]))
        reset_gpu(llm)
        answers(llm, prompts([1500]))
        whole, window = 1472 // 32, models.WINDOW // 32
        assert counters(llm)["loaded_blocks"] == whole + window
        assert answers(llm, prompts(LENGTHS))[0] == expected


def test_a_failed_load_of_several_groups_is_computed_again(
    hybrid: tuple[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvortex.connector.geometry import CAN_NAME_REQUESTS

    if not CAN_NAME_REQUESTS:
        pytest.skip("this vLLM ends at any failed load of several groups")
    model, expected = hybrid
    with running(model, 0.5, skip_tokenizer_init=True) as llm:
        answers(llm, prompts(LENGTHS))
        fail_copies(monkeypatch, Direction.LOAD, lambda *_: True)
        reset_gpu(llm)
        assert answers(llm, prompts(LENGTHS))[0] == expected
        assert counters(llm)["failed_loads"] > 0
        assert counters(llm)["loaded_blocks"] == 0
        monkeypatch.undo()
        reset_gpu(llm)
        assert answers(llm, prompts(LENGTHS))[0] == expected
        assert counters(llm)["loaded_blocks"] > 0
        assert connector(llm)._scheduler.offload.pending is False


def test_wrong_bytes_in_one_group_would_change_the_answers(
    hybrid: tuple[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this control the tests above could pass though nothing was loaded."""
    model, expected = hybrid
    with running(model, 0.5, skip_tokenizer_init=True) as llm:
        compares_nothing(monkeypatch)
        answers(llm, prompts(LENGTHS))
        index = connector(llm)._scheduler.offload.tier.index
        pool = worker_of_this_process()._copy_engine.pool.bytes
        for block in index:
            if block.key.endswith(b"\x00" * 4):  # of group 0
                pool[block.slot] = 0
        reset_gpu(llm)
        wrong = answers(llm, prompts(LENGTHS))[0]
        assert all(a != b for a, b, n in zip(wrong, expected, LENGTHS, strict=True) if n > 100)
