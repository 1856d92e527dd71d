"""Synthetic traces in Mooncake's format: chats, agents, documents and scans, a shifting mix."""

from __future__ import annotations

import heapq
import json
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BLOCK_TOKENS = 512


@dataclass
class Generator:
    """Makes requests in order of time; ids are given out as prefixes grow."""

    draw: random.Random
    now: float = 0.0
    next_id: int = 0
    due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    requests: list[dict[str, object]] = field(default_factory=list)

    def ids(self, count: int) -> list[int]:
        """New blocks."""
        self.next_id += count
        return list(range(self.next_id - count, self.next_id))

    def ask(self, blocks: list[int]) -> None:
        """A request, whose last block is not full."""
        tokens = len(blocks) * BLOCK_TOKENS + self.draw.randrange(1, BLOCK_TOKENS)
        told = {"timestamp": int(self.now * 1000), "input_length": tokens, "output_length": 200}
        self.requests.append(told | {"hash_ids": [*blocks, *self.ids(1)]})

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Do something after a while."""
        heapq.heappush(self.due, (self.now + seconds, self.draw.getrandbits(40), act))

    def run(self, until: float = float("inf"), count: int = 1 << 62) -> None:
        """Act until a time or a number of requests."""
        while self.due and self.due[0][0] < until and len(self.requests) < count:
            self.now, _, act = heapq.heappop(self.due)
            act()


def chat(made: Generator, rate: float = 3.0) -> None:
    """People who write again after a minute or two, below one of twenty system prompts."""
    prompts = [made.ids(made.draw.choice([1, 2, 4, 8])) for _ in range(20)]
    popularity = [1 / (i + 1) for i in range(20)]

    def turn(blocks: list[int], again: float) -> None:
        made.ask(blocks)
        if made.draw.random() < again:
            longer = blocks + made.ids(made.draw.choice([1, 1, 2, 4, 8]))
            wait = made.draw.lognormvariate(4.6, 0.8)
            made.later(wait, lambda: turn(longer, min(0.8, again + 0.12)))

    def begin() -> None:
        system = made.draw.choices(prompts, popularity)[0]
        turn(system + made.ids(int(made.draw.lognormvariate(1.5, 1.0)) + 1), 0.3)
        made.later(made.draw.expovariate(rate), begin)

    begin()


def agents(made: Generator, rate: float = 0.3) -> None:
    """Programs that call again within seconds, with all they had before and some more."""
    tools = [made.ids(12) for _ in range(4)]

    def step(blocks: list[int], left: int) -> None:
        made.ask(blocks)
        if left:
            longer = blocks + made.ids(made.draw.choice([1, 2, 3]))
            made.later(made.draw.lognormvariate(2.0, 0.7), lambda: step(longer, left - 1))

    def begin() -> None:
        step(made.draw.choice(tools) + made.ids(4), made.draw.randrange(5, 40))
        made.later(made.draw.expovariate(rate), begin)

    begin()


def documents(made: Generator, rate: float = 1.5) -> None:
    """Questions about popular documents, among long texts that are read once."""
    library = [made.ids(made.draw.randrange(8, 80)) for _ in range(400)]
    popularity = [1 / (i + 1) ** 0.9 for i in range(400)]

    def question() -> None:
        if made.draw.random() < 0.35:
            made.ask(made.ids(made.draw.randrange(20, 200)))
        else:
            made.ask(made.draw.choices(library, popularity)[0] + made.ids(1))
        made.later(made.draw.expovariate(rate), question)

    question()


def shifting(made: Generator) -> None:
    """A quarter of an hour of each, one after the other, and then of the first again."""
    for number, kind in enumerate((chat, documents, agents, chat)):
        made.due.clear()
        made.now = 900.0 * number
        kind(made)
        made.run(until=900.0 * (number + 1))
    made.due.clear()


WORKLOADS: dict[str, Callable[[Generator], None]] = {
    "chat": chat,
    "agents": agents,
    "documents": documents,
    "shifting": shifting,
}


def write(name: str, count: int, path: Path, seed: int = 0) -> None:
    """A trace of about `count` requests."""
    made = Generator(random.Random(seed))
    WORKLOADS[name](made)
    made.run(count=count)
    path.write_text("\n".join(json.dumps(request) for request in made.requests))
