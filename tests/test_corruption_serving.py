"""A real vLLM whose host memory lies while copies are under way: answers are right all the same."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
from engines import (
    LENGTHS,
    answers,
    connector,
    counters,
    prompts,
    reset_gpu,
    running,
    whole_blocks,
    worker_of_this_process,
)
from running_ahead import let_cpu_run_ahead

from kvortex.copy_engine import Ticket
from kvortex.core import Direction

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvortex.cargo import Cargo
    from kvortex.core import BlockIds

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

TOKENS = 8
SOME = slice(10, None, 2)
"""Of the prompts; those whose blocks are worth flipping."""


@pytest.fixture(scope="module", params=[False, True], ids=["step-by-step", "ahead"])
def engine(
    request: pytest.FixtureRequest, tiny_model: str, expected: list[list[int]]
) -> Iterator[Any]:
    """`expected` comes from another one, and there can be only one in a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")  # the other one always runs ahead
        let_cpu_run_ahead(patch)
        chunks = {"max_num_batched_tokens": 512}
        with running(tiny_model, 0.5, async_scheduling=request.param, **chunks) as llm:
            core = llm.llm_engine.engine_core.engine_core
            assert (core.batch_queue is not None) is request.param
            yield llm


@pytest.fixture
def llm(engine: Any) -> Any:
    """With nothing in it of the test before."""
    reset_gpu(engine, reset_connector=True)
    return engine


class Late(Ticket):
    """Its end, and what it found, is seen as late as on a GPU: by who waits, or after a while."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._polls_left = 9

    @property
    def done(self) -> bool:
        self._polls_left -= 1
        return self._polls_left < 0

    @property
    def bad_block_ids(self) -> Sequence[int]:
        return self._ticket.bad_block_ids

    def wait(self, timeout: float | None = None) -> bool:
        self._polls_left = 0
        return True


class BadMemory:
    """Flips a bit in some of the slots of copies: behind a store, or right before a load.

    Loads end late.

    Args:
        flips: in copies of which direction.
        share: of their slots.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, flips: Direction, share: float) -> None:
        engine = worker_of_this_process()._copy_engine
        self._copy, self._pool = engine._copy, engine.pool
        self._flips, self._share = flips, share
        self._draw = random.Random(flips.value)
        self._flipped: set[int] = set()
        self.loaded: list[int] = []
        """Flipped slots, as often as they were loaded."""
        monkeypatch.setattr(engine, "_copy", self.copy)

    def copy(self, direction: Direction, cargo: Cargo) -> Ticket:
        if direction is Direction.STORE:
            self._flipped.difference_update(cargo.slots.tolist())
            ticket: Ticket = self._copy(direction, cargo)
            self._flip_some(direction, cargo.slots)
            return ticket
        self._flip_some(direction, cargo.slots)
        self.loaded += self._flipped & set(cargo.slots.tolist())
        return Late(self._copy(direction, cargo))

    def _flip_some(self, direction: Direction, slots: BlockIds) -> None:
        """Not twice in one slot: that might undo the first."""
        for slot in slots.tolist() if direction is self._flips else ():
            if slot not in self._flipped and self._draw.random() < self._share:
                self._flipped.add(slot)
                place, bit = self._draw.randrange(self._pool.slot_bytes), self._draw.randrange(8)
                self._pool.bytes[slot, place] ^= 1 << bit


def wait_apart(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every load be waited for beside the requests that run."""
    side = connector(llm)._scheduler
    monkeypatch.setattr(type(side.costs), "pauses", lambda *_: True)
    side._turns.running = 1


@pytest.mark.parametrize("apart", [False, True], ids=["awaited", "apart"])
@pytest.mark.parametrize(
    ("flips", "share"), [(Direction.STORE, 0.1), (Direction.LOAD, 0.15)], ids=["stored", "loaded"]
)
def test_bits_that_flip_in_flight_are_found_by_the_load(
    llm: Any,
    expected: list[list[int]],
    flips: Direction,
    share: float,
    apart: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, before = prompts(LENGTHS)[SOME], counters(llm)
    right = [output[:TOKENS] for output in expected[SOME]]
    whole = whole_blocks(LENGTHS)[SOME]
    index = connector(llm)._scheduler.offload.tier.index
    quarantined = index.quarantined
    if apart:
        wait_apart(llm, monkeypatch)
    memory = BadMemory(monkeypatch, flips, share)
    for _ in range(3):
        assert answers(llm, asked, TOKENS)[0] == right
        reset_gpu(llm)
        counted = {name: number - before[name] for name, number in counters(llm).items()}
        assert counted["corrupt_blocks"] == counted["failed_loads"] == len(memory.loaded)
        assert index.quarantined - quarantined == len(set(memory.loaded))
    assert len(memory.loaded) >= 4
    assert bool(counted["apart_loads"]) is apart
    monkeypatch.undo()
    # What flipped and was met by no load yet is met by this one.
    assert answers(llm, asked, TOKENS)[0] == right
    reset_gpu(llm)
    assert answers(llm, asked, TOKENS) == (right, whole)
    assert connector(llm)._scheduler.offload.pending is False
    index.check()
