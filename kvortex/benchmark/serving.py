"""Serving: a vLLM engine, driven step by step in this process, so that each token's time is known.

Only these steps move it on, also what its connector has under way.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kvortex.benchmark.engine import greedy
from kvortex.benchmark.task import BenchmarkError
from kvortex.scrape import Scrape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvortex.benchmark.task import Conversations

RESET_WITHIN_S = 30
STILL_WITHIN_S = 300


@dataclass(slots=True, eq=False)
class Asked:
    """A request and when each of its tokens came, in seconds of `time.perf_counter`."""

    prompt: list[int]
    began: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    cached: int = 0

    @property
    def to_first_token(self) -> float:
        """In seconds."""
        return self.times[0] - self.began

    @property
    def gaps(self) -> list[float]:
        """Seconds between a token and the next."""
        return [after - before for before, after in pairwise(self.times)]

    @property
    def restorable(self) -> int:
        """Tokens that have KV: the last one of an answer is never computed."""
        return len(self.prompt) + len(self.tokens) - 1


class Serving:
    """Asks an LLMEngine of vLLM. `draw` is where prompts come from that need not be known again."""

    def __init__(self, engine: Any) -> None:  # noqa: ANN401  (vLLM's LLMEngine)
        self._engine = engine
        self._vocabulary: int = engine.vllm_config.model_config.get_vocab_size()
        self._asked: dict[str, Asked] = {}
        self._count = 0
        self.draw = random.Random(1)

    @property
    def block_tokens(self) -> int:
        """Tokens of a KV block."""
        tokens: int = self._engine.vllm_config.cache_config.block_size
        return tokens

    @property
    def gpu_tokens(self) -> int:
        """What the GPU's KV cache holds, as vLLM counts it."""
        tokens: int = self._engine.vllm_config.cache_config.kv_cache_size_tokens
        return tokens

    def prompt(self, length: int, draw: random.Random | None = None) -> list[int]:
        """Tokens from the middle of the vocabulary: special ones are at its ends."""
        draw = draw or self.draw
        middle = range(self._vocabulary // 4, self._vocabulary * 3 // 4)
        return draw.choices(middle, k=length)

    def submit(self, prompt: Sequence[int], tokens: int) -> Asked:
        """Begin a request; steps move it on."""
        self._count += 1
        name = f"request-{self._count}"
        asked = self._asked[name] = Asked(list(prompt), time.perf_counter())
        self._engine.add_request(name, {"prompt_token_ids": asked.prompt}, greedy(tokens))
        return asked

    def step(self) -> list[Asked]:
        """One step of the engine; the requests that it finished."""
        outputs, now = self._engine.step(), time.perf_counter()
        finished = []
        for output in outputs:
            asked = self._asked[output.request_id]
            new = list(output.outputs[0].token_ids)
            asked.tokens += new
            asked.times += [now] * len(new)
            asked.cached = output.num_cached_tokens or asked.cached
            if output.finished:
                finished.append(self._asked.pop(output.request_id))
        return finished

    def ask(self, prompt: Sequence[int], tokens: int = 4) -> Asked:
        """One request alone."""
        asked = self.submit(prompt, tokens)
        while asked not in self.step():
            pass
        return asked

    def converse(self, talks: Sequence[Talk], shape: Conversations) -> list[Asked]:
        """Serve turns in their order, a few at once; nobody speaks before their last answer."""
        waiting, running, done = list(talks), dict[Asked, Talk](), list[Asked]()
        while waiting or running:
            busy = list(running.values())
            ready = [talk for talk in dict.fromkeys(waiting) if talk not in busy]
            for talk in ready[: shape.at_once - len(busy)]:
                waiting.remove(talk)
                running[self.submit(talk.prompt, shape.answer)] = talk
            for asked in self.step():
                talk = running.pop(asked)
                new = self.prompt(shape.new, talk.draw)
                talk.prompt = asked.prompt + asked.tokens + new
                talk.answers.append(tuple(asked.tokens))
                done.append(asked)
        return done

    def settle(self, seconds: float = 0.3) -> None:
        """Let copies end, and be noticed: some connectors store in the step after."""
        for _ in range(2):
            self.ask(self.prompt(4), 2)
            time.sleep(seconds)

    def reset(self) -> None:
        """Empty the GPU's prefix cache; vLLM refuses while a store still reads from it.

        Raises:
            BenchmarkError: it goes on refusing.
        """
        deadline = time.monotonic() + RESET_WITHIN_S
        self.settle()
        while not self._engine.reset_prefix_cache():
            if time.monotonic() > deadline:
                raise BenchmarkError("vLLM's prefix cache cannot be reset: GPU hits would follow")
            self.settle(0.1)

    def clear(self) -> None:
        """Empty the GPU's prefix cache and, where the connector can, the tiers behind it."""
        self.reset()
        self._engine.reset_prefix_cache(reset_connector=True)

    def wait_for_memory(self) -> None:
        """Until KVortex has pinned its whole pool: what is stored before may find no slot.

        Raises:
            BenchmarkError: it takes too long.
        """
        self._wait_until_still("vllm:kvortex_slots")

    def wait_until_on_disk(self) -> None:
        """Until KVortex has nothing left to write, as far as its counters tell.

        Raises:
            BenchmarkError: it goes on writing.
        """
        self._wait_until_still("vllm:kvortex_disk_written_blocks_total")

    def _wait_until_still(self, name: str) -> None:
        """Until a metric stays as it is, or was never told."""
        deadline = time.monotonic() + STILL_WITHIN_S
        before = -1.0
        while (now := self.metrics().total(name)) != before:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{name} still changes after {STILL_WITHIN_S} s")
            before = now
            self.settle(0.7)

    def metrics(self) -> Scrape:
        """What a server's /metrics would say."""
        from prometheus_client import REGISTRY, generate_latest

        return Scrape.of(generate_latest(REGISTRY).decode(), time.monotonic())

    def close(self) -> None:
        """End the engine, and what its connector has."""
        self._engine.engine_core.shutdown()


@dataclass(slots=True, eq=False)
class Talk:
    """A conversation; `prompt` is what its user sends next, drawn from `draw`."""

    prompt: list[int]
    draw: random.Random
    answers: list[tuple[int, ...]] = field(default_factory=list)
