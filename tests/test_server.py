"""A real vLLM API server with KVortex in processes of its own, asked over HTTP."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from kvortex import KVortexConfig
from kvortex.server import Server, ServerError

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm]

BLOCK = 32
LENGTHS = [33, 64, 100, 500, 700, 1000, 1200, 1500]
ARGUMENTS = "--enforce-eager --dtype float32 --seed 0 --max-model-len 2048 --max-num-seqs 8"
ARGUMENTS += f" --block-size {BLOCK} --kv-cache-memory-bytes {64 << 20}"


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker too in a process of its own, as users of the CPU build run it; it takes longer."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(4, 260) for _ in range(length)] for length in LENGTHS]


def serve(model: str, folder: Path, transfer: dict[str, Any] | None) -> Server:
    return Server(model, folder, ARGUMENTS.split(), transfer)


@pytest.mark.usefixtures("processes")
def test_streamed_output_is_equal_and_metrics_show_the_hits(
    tiny_model: str, tmp_path: Path
) -> None:
    config = KVortexConfig(ram_pool_gb=0.5)
    with serve(tiny_model, tmp_path, config.kv_transfer_config()) as server:
        cold = [server.complete(prompt, 30).token_ids for prompt in prompts()]
        assert server.counter("vllm:external_prefix_cache_hits") == 0
        server.reset_prefix_cache()
        with ThreadPoolExecutor(len(LENGTHS)) as people:
            restored = list(people.map(lambda prompt: server.complete(prompt, 30), prompts()))
        hits = sum((length - 1) // BLOCK * BLOCK for length in LENGTHS)
        assert [answer.token_ids for answer in restored] == cold
        assert all(len(tokens) == 30 for tokens in cold)
        assert server.counter("vllm:external_prefix_cache_hits") == hits
        assert server.counter("vllm:prefix_cache_hits") == 0
        assert server.counter("vllm:kvortex_loaded_blocks") == hits // BLOCK
        assert server.counter("vllm:kvortex_stored_blocks") >= hits // BLOCK
        assert server.counter("vllm:kvortex_failed_loads") == 0
        assert server.counter("vllm:kvortex_hit_tokens") == hits


def test_speculative_decoding(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts repeat themselves, so that something is drafted."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    asked = [(prompt[:40] * 40)[:length] for prompt, length in zip(prompts(), LENGTHS, strict=True)]
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    drafts |= {"prompt_lookup_min": 1, "prompt_lookup_max": 2}
    arguments = [*ARGUMENTS.split(), "--speculative-config", json.dumps(drafts)]
    transfer = KVortexConfig(ram_pool_gb=0.5).kv_transfer_config()
    with Server(tiny_model, tmp_path, arguments, transfer) as server:
        cold = [server.complete(prompt, 30).token_ids for prompt in asked]
        assert server.counter("vllm:spec_decode_num_draft_tokens") > 0
        server.reset_prefix_cache()
        assert [server.complete(prompt, 30).token_ids for prompt in asked] == cold
        hits = sum((length - 1) // BLOCK * BLOCK for length in LENGTHS)
        assert server.counter("vllm:external_prefix_cache_hits") == hits


def test_bad_configuration_ends_the_server_at_once(tiny_model: str, tmp_path: Path) -> None:
    extra = {"kv_connector_extra_config": {"ram_pool": 1}}
    transfer = KVortexConfig().kv_transfer_config() | extra
    with pytest.raises(ServerError) as caught, serve(tiny_model, tmp_path, transfer):
        pass
    first = str(caught.value).splitlines()[0]
    words = "KVortex cannot start: unknown setting ram_pool=1: the settings are"
    assert first.startswith(words)
