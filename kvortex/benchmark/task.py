"""Task: what one process of a benchmark shall measure, as it travels there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from kvortex.core import KVortexError

ANSWER_TOKENS = 8
"""Of a prompt whose first token is timed; also what is compared of it."""


class BenchmarkError(KVortexError, RuntimeError):
    """A measurement could not be made; the message says why."""


@dataclass(frozen=True, slots=True)
class Conversations:
    """Users who return in random order, some at once. Lengths are in tokens."""

    users: int
    context: int
    """Of a first prompt."""
    at_once: int = 8
    returns: int = 2
    """How often each user comes back."""
    new: int = 64
    """What a user adds to the answer."""
    answer: int = 32

    @property
    def longest(self) -> int:
        """Tokens of a conversation at its end."""
        return self.context + self.returns * self.new + (self.returns + 1) * self.answer


@dataclass(frozen=True, slots=True)
class Task:
    """One vLLM and what it is asked.

    `disk` says that prompts were seen by an earlier process, which left them on disk: each is then
    asked once, and not computed first.
    """

    model: str
    kv_transfer_config: dict[str, Any] | None
    vllm_arguments: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    repeats: int = 3
    disk: bool = False
    leave_on_disk: bool = False
    """Whether to wait at the end until the disk has what a later process will ask for; users are
    left to that one, which is told the same, so that its vLLM is the same."""
    gpu_tokens: int | None = None
    """What the GPU's KV cache shall hold; None is whatever vLLM finds room for."""
    conversations: Conversations | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        asked = [length + ANSWER_TOKENS for length in self.lengths]
        return max([*asked, self.conversations.longest if self.conversations else 0])

    def to_json(self) -> str:
        """For `from_json`, in another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The task that was sent."""
        told = json.loads(text)
        for name in ("vllm_arguments", "lengths"):
            told[name] = tuple(told[name])
        if told["conversations"] is not None:
            told["conversations"] = Conversations(**told["conversations"])
        return cls(**told)
