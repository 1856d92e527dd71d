"""What a serving engine is put through, one function for each scenario; each returns rows.

All of them drive one vLLM engine step by step in this process, so that the moment of every token is
known. Lengths are in tokens, and `scale` shrinks them for a quick look on a small machine.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kvortex.benchmark.conversations import converse
from kvortex.benchmark.serving import Asked, Serving
from kvortex.benchmark.task import Conversations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Row = dict[str, Any]

LONG, CONTEXT = 32_768, 8_192
SHORTEST = 128
REPEATS = 5
USERS, ON_GPU, CONCURRENCY = 32, 4, 8
RETURNS, OFTEN = 2, 8
NEW_TOKENS, ANSWER = 64, 32
RUNNING, DECODED, BESIDE = 8, 256, 16
CONVERSATIONS = 8


class ScaledServing(Serving):
    """One whose lengths are shrunk."""

    def __init__(self, engine: Any, scale: float) -> None:
        super().__init__(engine)
        self._scale = scale

    def length(self, tokens: int) -> int:
        return scaled(tokens, self._scale)


def half(serving: ScaledServing) -> list[Row]:
    """First token of a prompt whose first half was seen before."""
    seen = serving.length(LONG // 2)
    return _hits(serving, seen, serving.length(LONG) - seen)


def one_head(serving: ScaledServing) -> list[Row]:
    """First token of a prompt that was seen before; meant for a model with one KV head."""
    return _hits(serving, serving.length(LONG), 0)


def _hits(serving: ScaledServing, seen: int, new: int) -> list[Row]:
    known = serving.prompt(seen)
    serving.ask(known + serving.prompt(new))
    host, gpu = [], []
    for _ in range(REPEATS):
        serving.reset()
        host.append(serving.ask(known + serving.prompt(new)))
        serving.settle(0.1)
        gpu.append(serving.ask(known + serving.prompt(new)))
    return [
        spread("first token, host hit", "s", [asked.to_first_token for asked in host]),
        spread("first token, GPU hit", "s", [asked.to_first_token for asked in gpu]),
        spread("host hit", "tokens", [asked.cached for asked in host]),
        spread("GPU hit", "tokens", [asked.cached for asked in gpu]),
    ]


def users(serving: ScaledServing, returns: int = RETURNS) -> list[Row]:
    """Conversations that return in random order while others are served."""
    shape = Conversations(USERS, serving.length(CONTEXT), CONCURRENCY, returns, NEW_TOKENS, ANSWER)
    found = converse(serving, shape)
    return [
        single("served", "requests/s", found.requests / found.seconds),
        spread("first token, returning", "s", found.first_token_s),
        single("cached", "share", found.cached_tokens / found.prompt_tokens),
    ]


def decode(serving: ScaledServing) -> list[Row]:
    """Time per token of running requests, beside others that bring prompts.

    First nothing is beside them, then new prompts (which are stored), then the same as GPU hits
    (nothing moves; what a connector is to be compared with) and as host hits (without a connector:
    computed).
    """
    beside = [serving.prompt(serving.length(CONTEXT)) for _ in range(BESIDE)]
    rows = _running(serving, "alone", [])
    rows += _running(serving, "beside new prompts", beside)
    serving.settle()
    rows += _running(serving, "beside GPU hits", beside)
    serving.reset()
    return rows + _running(serving, "beside host hits", beside)


def _running(serving: ScaledServing, what: str, beside: list[list[int]]) -> list[Row]:
    """The running requests' tokens from when all have begun; others come at even distances."""
    running = [serving.submit(serving.prompt(SHORTEST), DECODED) for _ in range(RUNNING)]
    while not all(asked.times for asked in running):
        serving.step()
    began, others, steps = time.perf_counter(), list[Asked](), 0
    ended = list[Asked]()
    while len(ended) < RUNNING + len(beside):
        if steps % (DECODED // BESIDE) == 0 and len(others) < len(beside):
            others.append(serving.submit(beside[len(others)], 1))
        ended += serving.step()
        steps += 1
    gaps = [
        1000 * gap
        for asked in running
        for gap, at in zip(asked.gaps, asked.times, strict=False)
        if at >= began
    ]
    rows = [spread(what, "ms/token", gaps), single(what, "mean ms/token", sum(gaps) / len(gaps))]
    if others:
        share = sum(one.cached for one in others) / sum(len(one.prompt) for one in others)
        rows.append(single(what, "cached share", share))
    return rows


def restore(serving: ScaledServing, block_tokens: int = 16) -> list[Row]:
    """Share of the tokens of long conversations that need not be computed when they return."""
    length = serving.length(LONG) - NEW_TOKENS - ANSWER
    first = [serving.ask(serving.prompt(length), ANSWER) for _ in range(CONVERSATIONS)]
    serving.settle()
    again = [
        serving.ask(asked.prompt + asked.tokens + serving.prompt(NEW_TOKENS), 1) for asked in first
    ]
    whole = sum(asked.restorable // block_tokens * block_tokens for asked in first)
    return [
        single("restored", "share", sum(asked.cached for asked in again) / whole),
        spread("first token, returning", "s", [asked.to_first_token for asked in again]),
    ]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario and the engine that it needs; those that need the same one share a process."""

    run: Callable[[ScaledServing], list[Row]]
    one_head: bool = False
    capped: bool = False
    """Whether the GPU's KV cache is held down to `ON_GPU` conversations."""
    host_gib: float = 0
    """At least so much host memory."""
    returns: int = RETURNS
    """Of each conversation, at most."""


SCENARIOS = {
    "half": Scenario(half),
    "decode": Scenario(decode),
    "one-head": Scenario(one_head, one_head=True),
    "users": Scenario(users, capped=True),
    "often": Scenario(partial(users, returns=OFTEN), capped=True, returns=OFTEN),
    "restore": Scenario(restore, capped=True, host_gib=32),
}


def scaled(tokens: int, scale: float) -> int:
    return max(SHORTEST, round(tokens * scale))


def capped_blocks(scale: float, block_tokens: int, returns: int) -> int:
    """GPU blocks for `ON_GPU` whole conversations, and vLLM's null block."""
    longest = scaled(CONTEXT, scale) + returns * NEW_TOKENS + (returns + 1) * ANSWER
    return ON_GPU * math.ceil(longest / block_tokens) + 1


def longest_request(scale: float) -> int:
    """Tokens of the longest request of any scenario."""
    return scaled(LONG, scale) + 2 * (DECODED if scale < 1 else ANSWER)


def spread(measure: str, unit: str, samples: Iterable[float]) -> Row:
    """A row of quantiles; `value` is the median."""
    ordered = sorted(samples)
    quantiles = {f"p{q}": _round(_quantile(ordered, q / 100)) for q in (20, 80, 99)}
    return {"measure": measure, "unit": unit, "value": _round(_quantile(ordered, 0.5))} | quantiles


def single(measure: str, unit: str, value: float) -> Row:
    """A row of one number."""
    return {"measure": measure, "unit": unit, "value": _round(value)} | dict.fromkeys(
        ("p20", "p80", "p99"), ""
    )


def _quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[round(q * (len(ordered) - 1))]


def _round(value: float) -> float:
    return float(f"{value:.5g}")
