"""`kvortex demo`: the whole of it, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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


def test_a_pool_larger_than_the_machine_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--ram-pool-gb", "60000"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ram_pool_gb=60000: this machine has" in line


@pytest.mark.vllm
def test_a_terminated_demo_ends_its_server(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    command = [sys.executable, "-m", "kvortex", "demo"]
    demo = subprocess.Popen(
        command, env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True
    )
    assert demo.stderr is not None
    while "starting" not in (line := demo.stderr.readline()):
        assert line
    while not any(log.stat().st_size for log in tmp_path.glob("*/server.log")):
        assert demo.poll() is None
    servers = children(demo.pid)
    assert servers
    demo.terminate()
    demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in servers)
    assert list(tmp_path.iterdir()) == []


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_demo_restores_and_outputs_are_equal() -> None:
    """As the README starts it, but for the setting up of .venv."""
    pytest.importorskip("vllm")
    make = [
        "make",
        "--no-print-directory",
        "-o",
        ".venv/ready",
        f"BIN={Path(sys.executable).parent}",
        "demo",
    ]
    shown = subprocess.run(
        [*make, "ARGS=--json"],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    result = json.loads(shown.stdout.splitlines()[-1])
    assert result["outputs_equal"] is True
    assert result["gpu_hit_tokens"] == 0
    assert result["restored_tokens"] > 0.9 * result["prompt_tokens"]
    parts = result["gpu_hit_tokens"] + result["restored_tokens"] + result["recomputed_tokens"]
    assert parts == result["prompt_tokens"]
    assert "vLLM with KVortex: starting" in shown.stderr


def test_conversations_are_eight_times_the_kv_cache() -> None:
    tokens = 12 * (1500 + 24 + 40 + 24)
    cache = (num_gpu_blocks() - 1) * kvortex.demo.BLOCK_TOKENS
    assert OVERSUBSCRIPTION <= tokens / cache < OVERSUBSCRIPTION * 1.02
