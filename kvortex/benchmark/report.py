"""Report: what a benchmark found, and whether it may be believed."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvortex import __version__
from kvortex.benchmark.first_token import COLD, GPU, SOURCES
from kvortex.benchmark.ways import NONE, WAYS
from kvortex.metrics import MissReason

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvortex.benchmark.conversations import Conversed
    from kvortex.benchmark.first_token import Sample
    from kvortex.benchmark.measured import Measured
    from kvortex.benchmark.plan import Plan

SHOWN = {"cold": "computed", "gpu": "GPU hit", "host": "host hit", "disk": "disk hit"}
ENOUGH = 0.9
"""Of a prompt's whole blocks, for a hit to be called one."""
SLOWEST = 0.99


@dataclass(frozen=True, slots=True)
class Times:
    """Of one way, prompt length and source: seconds to the first token, and who served the rest.

    `share` is that part of the prompt's whole blocks that the source served, by the metrics; of
    what was computed, that which any tier served, which should be nothing.
    """

    length: int
    source: str
    median_s: float
    fastest_s: float
    slowest_s: float
    share: float
    missed_tokens: dict[str, int]

    @classmethod
    def of(cls, samples: list[Sample], block_tokens: int) -> Times:
        """Samples of one length and source."""
        first = samples[0]
        seconds = [sample.seconds for sample in samples]
        whole = (first.length - 1) // block_tokens * block_tokens
        served = [
            sample.served_tokens
            if sample.source == COLD
            else getattr(sample, f"{sample.source}_tokens")
            for sample in samples
        ]
        missed = Counter[str]()
        for sample in samples:
            missed.update(sample.missed_tokens)
        return cls(
            first.length,
            first.source,
            statistics.median(seconds),
            min(seconds),
            max(seconds),
            sum(served) / max(whole * len(samples), 1),
            {} if first.source == COLD else dict(missed),
        )

    @property
    def as_it_should_be(self) -> bool:
        """Whether it was computed, or came from where it should; what did not pay may not."""
        if self.source == COLD:
            return self.share == 0
        return self.share >= ENOUGH or set(self.missed_tokens) == {MissReason.NOT_WORTH_LOADING}

    @property
    def why_not(self) -> str:
        """Where the rest of a hit was, in one word, if there is one."""
        return max(self.missed_tokens, key=self.missed_tokens.__getitem__, default="not there")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "prompt_tokens": self.length,
            "source": self.source,
            "median_s": round(self.median_s, 6),
            "fastest_s": round(self.fastest_s, 6),
            "slowest_s": round(self.slowest_s, 6),
            "served_share": round(self.share, 4),
            "missed_tokens": self.missed_tokens,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured of each way, and why the others failed."""

    plan: Plan
    machine: Mapping[str, str]
    measured: Mapping[str, Measured]
    failed: Mapping[str, str]

    def times(self, way: str) -> list[Times]:
        """In the order of lengths and sources."""
        found = self.measured[way]
        order = sorted(found.sources(), key=lambda each: (each[0], SOURCES.index(each[1])))
        return [Times.of(found.of(*each), found.block_tokens) for each in order]

    def problems(self) -> list[str]:
        """Whatever makes the figures doubtful, each in a line."""
        told = [f"{WAYS[way]} failed: {why}" for way, why in self.failed.items()]
        for way in self.measured:
            for times in self.times(way):
                if not times.as_it_should_be:
                    what = f"{WAYS[way]}, {SHOWN[times.source]} of {times.length} tokens"
                    told.append(f"{what}: {times.share:.0%} served from there ({times.why_not})")
        return told + [f"an output differs: {where}" for where in self._differences()]

    def _differences(self) -> Iterator[str]:
        """Answers that are not those of vLLM alone, or of the same prompt on the GPU.

        A hit is compared with a GPU hit of as many tokens, which computes the same: what is
        computed otherwise is rounded otherwise.
        """
        alone = self.measured.get(NONE)
        for way, found in self.measured.items():
            there = {(s.length, s.prompt): s for s in found.samples if s.source == GPU}
            for sample in found.samples:
                where = f"{WAYS[way]}, {SHOWN[sample.source]} of {sample.length} tokens"
                on_gpu = there[sample.length, sample.prompt]
                if (
                    sample.source not in {COLD, GPU}
                    and sample.served_tokens == on_gpu.served_tokens
                    and sample.answer != on_gpu.answer
                ):
                    yield f"{where}, from that of a GPU hit"
                if alone is not None and sample.source in {COLD, GPU}:
                    others = alone.of(sample.length, sample.source)
                    answers = {other.prompt: other.answer for other in others}
                    if answers.get(sample.prompt, sample.answer) != sample.answer:
                        yield f"{where}, from that of vLLM alone"

    def equal_answers(self, way: str) -> float | None:
        """Share of users whose answers in conversations were those of vLLM alone.

        Requests that are batched otherwise are rounded otherwise: only of a float32 model all
        have to be equal.
        """
        alone, found = self.measured.get(NONE), self.measured.get(way)
        if alone is None or found is None or not alone.conversed or not found.conversed:
            return None
        pairs = list(zip(alone.conversed.answers, found.conversed.answers, strict=True))
        return sum(one == other for one, other in pairs) / len(pairs)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kvortex": __version__,
            "machine": dict(self.machine),
            "model": self.plan.name,
            "vllm_arguments": list(self.plan.vllm_arguments),
            "settings": self.plan.config.model_dump(),
            "ways": {way: self._way(way) for way in self.measured},
            "problems": self.problems(),
        }

    def _way(self, way: str) -> dict[str, Any]:
        found = self.measured[way]
        told: dict[str, Any] = {
            "name": WAYS[way],
            "start_up_s": round(found.start_up_s, 1),
            "gpu_tokens": found.gpu_tokens,
            "first_token": [times.as_dict() for times in self.times(way)],
        }
        if found.conversed is not None:
            told["conversations"] = {
                name: figure for name, _, figure in figures(found.conversed)
            } | {"equal_answers": self.equal_answers(way)}
        return told


def figures(found: Conversed) -> list[tuple[str, str, float]]:
    """Key, name and value of what is told of conversations."""
    ordered = sorted(found.first_token_s)
    slow = ordered[round((len(ordered) - 1) * SLOWEST)]
    return [
        ("requests_per_s", "requests/s", found.requests / found.seconds),
        ("answer_tokens_per_s", "answer tokens/s", found.answer_tokens / found.seconds),
        ("first_token_median_s", "first token, median, s", statistics.median(ordered)),
        ("first_token_p99_s", "first token, p99, s", slow),
        ("cached_share", "prompt tokens not computed", found.cached_tokens / found.prompt_tokens),
    ]
