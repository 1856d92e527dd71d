"""The demonstration: a vLLM serves conversations that return after their KV was pushed out."""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvortex.free_memory import require_free_memory
from kvortex.server import Answer, Server
from kvortex.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvortex.config import KVortexConfig

CONVERSATIONS = 12
FIRST_TURN_TOKENS = 1500
NEXT_TURN_TOKENS = 40
ANSWER_TOKENS = 24
BLOCK_TOKENS = 32
OVERSUBSCRIPTION = 8
"""How many times the KV cache all conversations together would fill it."""
BYTE_TOKENS = range(4, 260)


@dataclass(frozen=True, slots=True)
class Result:
    """Tokens and times of the returning turns; times are medians."""

    outputs_equal: bool
    prompt_tokens: int
    gpu_hit_tokens: int
    restored_tokens: int
    recomputed_tokens: int
    ttft_cold_ms: float
    ttft_restored_ms: float

    @property
    def ok(self) -> bool:
        """Whether KVortex did what it is for."""
        return self.outputs_equal and self.restored_tokens > 0

    def as_dict(self) -> dict[str, bool | int | float]:
        """Name to value."""
        return asdict(self)

    def table(self) -> str:
        """For a person's eyes."""
        speed_up = self.ttft_cold_ms / self.ttft_restored_ms
        rows = [
            (f"prompts of {CONVERSATIONS} returning conversations", f"{self.prompt_tokens} tokens"),
            ("  served from the GPU", f"{self.gpu_hit_tokens} tokens"),
            ("  restored by KVortex", f"{self.restored_tokens} tokens"),
            ("  recomputed", f"{self.recomputed_tokens} tokens"),
            ("time to first token, without KVortex", f"{self.ttft_cold_ms:.1f} ms"),
            ("time to first token, with KVortex", f"{self.ttft_restored_ms:.1f} ms"),
            ("  ratio", f"{speed_up:.1f}x"),
            ("every greedy output equal", "yes" if self.outputs_equal else "NO"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value:>12}" for name, value in rows)


@dataclass(frozen=True, slots=True)
class _Served:
    """What one server did: its answers to both turns, and token counts of the second."""

    first: list[Answer]
    second: list[Answer]
    prompt_tokens: int
    gpu_hit_tokens: int
    restored_tokens: int


def run_demo(config: KVortexConfig, say: Callable[[str], None] | None = None) -> Result:
    """Serve the same conversations without and with KVortex, one server after the other.

    Args:
        config: settings of the server with KVortex.
        say: called with each line of progress; by default they go to standard error.

    Raises:
        ConfigError: the machine has not as much free memory.
        ServerError: a vLLM did not start, or died.
    """
    require_free_memory(config.ram_pool_gb, config.ram_pool_bytes)
    say = say or _print_progress
    with tempfile.TemporaryDirectory(prefix="kvortex-demo-") as temporary:
        folder = Path(temporary)
        say("making a tiny random model")
        make_tiny_model(folder / "model")
        without = _serve(folder, None, say)
        with_kvortex = _serve(folder, config, say)
    return Result(
        outputs_equal=_tokens(without) == _tokens(with_kvortex),
        prompt_tokens=with_kvortex.prompt_tokens,
        gpu_hit_tokens=with_kvortex.gpu_hit_tokens,
        restored_tokens=with_kvortex.restored_tokens,
        recomputed_tokens=with_kvortex.prompt_tokens
        - with_kvortex.gpu_hit_tokens
        - with_kvortex.restored_tokens,
        ttft_cold_ms=_median_ms(without.second),
        ttft_restored_ms=_median_ms(with_kvortex.second),
    )


def num_gpu_blocks() -> int:
    """Blocks of a KV cache that holds an eighth of the conversations (one is never used)."""
    conversation = FIRST_TURN_TOKENS + ANSWER_TOKENS + NEXT_TURN_TOKENS + ANSWER_TOKENS
    return CONVERSATIONS * conversation // OVERSUBSCRIPTION // BLOCK_TOKENS + 1


def _serve(folder: Path, config: KVortexConfig | None, say: Callable[[str], None]) -> _Served:
    who = "vLLM with KVortex" if config else "vLLM without KVortex"
    blocks = num_gpu_blocks()
    arguments = ["--enforce-eager", "--seed", "0", "--block-size", str(BLOCK_TOKENS)]
    arguments += ["--dtype", "float32"]  # so that no rounding decides which token is likeliest
    arguments += ["--num-gpu-blocks-override", str(blocks), "--max-num-seqs", "8"]
    arguments += ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(256 << 20)]
    say(f"{who}: starting, with a KV cache of {blocks - 1} blocks of {BLOCK_TOKENS} tokens")
    transfer = config.kv_transfer_config() if config else None
    with Server(str(folder / "model"), folder, arguments, transfer) as server:
        draw = random.Random(0)
        server.complete(_question(draw, 300), ANSWER_TOKENS)  # what is slow only once
        prompts = [_question(draw, FIRST_TURN_TOKENS) for _ in range(CONVERSATIONS)]
        say(f"{who}: {CONVERSATIONS} conversations of {FIRST_TURN_TOKENS} tokens begin")
        first = [server.complete(prompt, ANSWER_TOKENS) for prompt in prompts]
        returning = [
            prompt + list(answer.token_ids) + _question(draw, NEXT_TURN_TOKENS)
            for prompt, answer in zip(prompts, first, strict=True)
        ]
        say(f"{who}: each comes back, {OVERSUBSCRIPTION}x the KV cache later")
        before = _counters(server)
        second = [server.complete(prompt, ANSWER_TOKENS) for prompt in returning]
        after = _counters(server)
    return _Served(first, second, *(b - a for a, b in zip(before, after, strict=True)))


def _question(draw: random.Random, tokens: int) -> list[int]:
    return draw.choices(BYTE_TOKENS, k=tokens)


def _counters(server: Server) -> tuple[int, int, int]:
    return (
        server.counter("vllm:prompt_tokens"),
        server.counter("vllm:prefix_cache_hits"),
        server.counter("vllm:external_prefix_cache_hits"),
    )


def _tokens(served: _Served) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in (*served.first, *served.second)]


def _median_ms(answers: list[Answer]) -> float:
    return round(statistics.median(answer.first_token_s for answer in answers) * 1000, 2)


def _print_progress(line: str) -> None:
    print(f"[kvortex demo] {line}", file=sys.stderr, flush=True)
