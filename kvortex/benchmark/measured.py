"""Measured: what the process of a task found, as it travels back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from kvortex.benchmark.conversations import Conversed
from kvortex.benchmark.first_token import Sample

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Measured:
    """What one vLLM did, or several of the same way after another."""

    start_up_s: float
    block_tokens: int
    gpu_tokens: int
    """What the GPU's KV cache holds."""
    samples: tuple[Sample, ...]
    conversed: Conversed | None

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Self:
        """As it came out of JSON."""
        samples = tuple(
            Sample(**sample | {"answer": tuple(sample["answer"])}) for sample in told["samples"]
        )
        conversed = None
        if (one := told["conversed"]) is not None:
            lists = {name: tuple(one[name]) for name in ("first_token_s", "answers")}
            conversed = Conversed(**one | lists)
        return cls(**told | {"samples": samples, "conversed": conversed})

    def then(self, later: Measured) -> Measured:
        """Both together; the start is that of the first."""
        conversed = later.conversed or self.conversed
        samples = self.samples + later.samples
        return Measured(self.start_up_s, self.block_tokens, self.gpu_tokens, samples, conversed)

    def of(self, length: int, source: str) -> list[Sample]:
        """The samples of one prompt length and source."""
        return [s for s in self.samples if (s.length, s.source) == (length, source)]

    def sources(self) -> Iterable[tuple[int, str]]:
        """Lengths and sources that were measured, in that order."""
        return dict.fromkeys((sample.length, sample.source) for sample in self.samples)
