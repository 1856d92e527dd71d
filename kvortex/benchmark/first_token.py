"""Time to first token: computed, and as a hit of each tier. In the process of the engine."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvortex.benchmark.task import ANSWER_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvortex.benchmark.serving import Serving
    from kvortex.benchmark.task import Task

COLD, GPU, HOST, DISK = "cold", "gpu", "host", "disk"
SOURCES = (COLD, GPU, HOST, DISK)


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt, asked once.

    Served tokens are those that the request was told of, by tier as vLLM's and KVortex's metrics
    counted them; what those did not count is taken to have come from where it should.
    """

    length: int
    prompt: int
    """Its number among those of its length."""
    source: str
    """Where its KV should have come from."""
    seconds: float
    gpu_tokens: int
    host_tokens: int
    disk_tokens: int
    missed_tokens: dict[str, int]
    """By KVortex's reason, where it tells one."""
    answer: tuple[int, ...]

    @property
    def served_tokens(self) -> int:
        """Of the prompt, from wherever."""
        return self.gpu_tokens + self.host_tokens + self.disk_tokens

    def as_dict(self) -> dict[str, Any]:
        """For JSON, and for `Sample(**...)`."""
        return asdict(self)


def measure(serving: Serving, task: Task, say: Callable[[str], None]) -> Iterator[Sample]:
    """Ask every prompt from each tier; the first of a length warms up, and is not told."""
    for length in task.lengths:
        for number in range(task.repeats + 1):
            at = f"{number} of {task.repeats}" if number else "warming up"
            say(f"first token of {length} tokens, {at}")
            prompt = serving.prompt(length, random.Random(f"{length}/{number}"))
            for sample in _samples(serving, task, prompt, number):
                if number:
                    yield sample


def _samples(serving: Serving, task: Task, prompt: list[int], number: int) -> Iterator[Sample]:
    if task.disk:
        serving.settle(0.1)
        yield _ask(serving, prompt, number, DISK)
        return
    yield _ask(serving, prompt, number, COLD)
    serving.settle()
    yield _ask(serving, prompt, number, GPU)
    if task.kv_transfer_config is not None:
        serving.reset()
        yield _ask(serving, prompt, number, HOST)


def _ask(serving: Serving, prompt: list[int], number: int, source: str) -> Sample:
    before = serving.metrics()
    asked = serving.ask(prompt, ANSWER_TOKENS)
    now = serving.metrics().since(before)
    disk = now.total("vllm:kvortex_disk_hit_tokens_total")
    missed = defaultdict[str, int](int)
    for reason, tokens in now.by("vllm:kvortex_missed_tokens_total", "reason").items():
        missed[reason] += int(tokens)
    served = {
        GPU: int(now.total("vllm:prefix_cache_hits_total")),
        HOST: int(now.total("vllm:external_prefix_cache_hits_total") - disk),
        DISK: int(disk),
    }
    if source in served:  # LLMEngine of vLLM 0.26 drops the statistics of a step without outputs
        served[source] += max(0, asked.cached - sum(served.values()))
    return Sample(
        length=len(prompt),
        prompt=number,
        source=source,
        seconds=asked.to_first_token,
        gpu_tokens=served[GPU],
        host_tokens=served[HOST],
        disk_tokens=served[DISK],
        missed_tokens={reason: tokens for reason, tokens in missed.items() if tokens},
        answer=tuple(asked.tokens),
    )
