"""`kvortex demo`: the whole of it, and what it says when something is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import kvortex.demo
from kvortex.cli import main
from kvortex.demo import OVERSUBSCRIPTION, Result, num_gpu_blocks

GOOD = Result(
    outputs_equal=True,
    prompt_tokens=100,
    gpu_hit_tokens=10,
    restored_tokens=80,
    recomputed_tokens=10,
    ttft_cold_ms=50.0,
    ttft_restored_ms=5.0,
)


@pytest.mark.parametrize(
    ("result", "code", "complaint"),
    [
        (GOOD, 0, ""),
        (replace(GOOD, outputs_equal=False), 1, "an output differs"),
        (replace(GOOD, restored_tokens=0), 1, "nothing was restored"),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_exit_code_says_whether_it_worked(
    result: Result,
    code: int,
    complaint: str,
    as_json: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kvortex.demo, "run_demo", lambda config: result)
    assert main(["demo", *(["--json"] if as_json else [])]) == code
    shown = capsys.readouterr()
    assert complaint in shown.err
    if as_json:
        assert json.loads(shown.out) == result.as_dict()
    else:
        assert "10.0x" in shown.out
        assert ("NO" in shown.out) is (not result.outputs_equal)


@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_demo_restores_and_outputs_are_equal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    assert main(["demo", "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["outputs_equal"] is True
    assert result["gpu_hit_tokens"] == 0
    assert result["restored_tokens"] > 0.9 * result["prompt_tokens"]
    parts = result["gpu_hit_tokens"] + result["restored_tokens"] + result["recomputed_tokens"]
    assert parts == result["prompt_tokens"]
    assert "vLLM with KVortex: starting" in shown.err


def test_conversations_are_eight_times_the_kv_cache() -> None:
    tokens = 12 * (1500 + 24 + 40 + 24)
    cache = (num_gpu_blocks() - 1) * kvortex.demo.BLOCK_TOKENS
    assert OVERSUBSCRIPTION <= tokens / cache < OVERSUBSCRIPTION * 1.02
