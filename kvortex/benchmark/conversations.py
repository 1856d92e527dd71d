"""Throughput of conversations that return to a GPU that cannot hold them all."""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvortex.benchmark.serving import Talk

if TYPE_CHECKING:
    from kvortex.benchmark.serving import Serving
    from kvortex.benchmark.task import Conversations


@dataclass(frozen=True, slots=True)
class Conversed:
    """The returning turns of all users together; first turns are not timed."""

    requests: int
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    """Of the prompts, from whatever tier."""
    answer_tokens: int
    first_token_s: tuple[float, ...]
    answers: tuple[str, ...]
    """A digest of each user's answers, to be compared."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, and for `Conversed(**...)`."""
        return asdict(self)


def converse(serving: Serving, shape: Conversations) -> Conversed:
    """Let all users begin, and then return in a random order, which is always the same."""
    talks = [_talk(serving, shape, number) for number in range(shape.users)]
    serving.converse(talks, shape)
    serving.settle()
    order = random.Random("order")
    turns = [talk for _ in range(shape.returns) for talk in order.sample(talks, len(talks))]
    began = time.perf_counter()
    asked = serving.converse(turns, shape)
    seconds = time.perf_counter() - began
    return Conversed(
        requests=len(asked),
        seconds=seconds,
        prompt_tokens=sum(len(one.prompt) for one in asked),
        cached_tokens=sum(one.cached for one in asked),
        answer_tokens=sum(len(one.tokens) for one in asked),
        first_token_s=tuple(one.to_first_token for one in asked),
        answers=tuple(hashlib.sha256(repr(t.answers).encode()).hexdigest() for t in talks),
    )


def _talk(serving: Serving, shape: Conversations, number: int) -> Talk:
    draw = random.Random(f"user {number}")
    return Talk(serving.prompt(shape.context, draw), draw)
