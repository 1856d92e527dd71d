"""KVortexEngine against a dict of bytes, over every policy, with copies that fail or are late."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from budget import budget
from doubles import CommandedCopyEngine, CommandedTicket, open_commanded
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import kvortex.engine
from kvortex import BlockNotFoundError, KVortexConfig, KVortexEngine, TransferError
from kvortex.config import GIB
from kvortex.core import Direction
from kvortex.plugins import policy_names

if TYPE_CHECKING:
    from kvortex.engine import Transfer

NUM_BLOCKS = 6
SLOT_BYTES = 16 + 32
KEYS = [b"a", b"b", b"c", b"d", b"e", b"f"]
keys = st.sampled_from(KEYS)
blocks = st.integers(0, NUM_BLOCKS - 1)


@dataclass(frozen=True)
class Saved:
    """One version of a key's bytes; later saves have larger numbers."""

    number: int
    data: bytes


@dataclass(eq=False)
class Under:
    """A transfer under way: per block its key, and the version that it carries."""

    direction: Direction
    transfer: Transfer
    ticket: CommandedTicket | None
    """None if the copy was refused."""
    moves: list[tuple[bytes, int, Saved]]
    discard: bool = False

    @property
    def ended(self) -> bool:
        return self.ticket is None or self.ticket.ended

    @property
    def failed(self) -> bool:
        return self.ticket is None or self.ticket.failed


class EngineMachine(RuleBasedStateMachine):
    """The model: `there` is what may be readable, `newest` the number last committed of each key.

    Eviction is the policy's choice; the model only counts that no key leaves without one.
    """

    policy: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.there: dict[bytes, Saved] = {}
        self.newest: dict[bytes, int] = {}
        self.under: list[Under] = []
        self.past: list[tuple[Transfer, bool]] = []
        self.numbers = itertools.count(1)
        self.evictions = 0

    @initialize(num_slots=st.integers(1, 7))
    def open(self, num_slots: int) -> None:
        self.kv = [torch.zeros(NUM_BLOCKS, size, dtype=torch.uint8) for size in (7, 32)]
        config = KVortexConfig(
            ram_pool_gb=num_slots * SLOT_BYTES / GIB, eviction_policy=self.policy
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kvortex.worker, "open_copy_engine", open_commanded)
            self.engine = KVortexEngine(config, {str(i): kv for i, kv in enumerate(self.kv)})
        copies = self.engine._worker._copy_engine
        assert isinstance(copies, CommandedCopyEngine)
        self.copies = copies
        self.index = self.engine._scheduler.tier.index
        assert self.index.num_slots == num_slots
        for block in range(NUM_BLOCKS):
            self.write(block)

    def bytes_of(self, block: int) -> bytes:
        return b"".join(bytes(kv[block].tolist()) for kv in self.kv)

    def busy(self, direction: Direction) -> set[int]:
        return {b for u in self.under if u.direction is direction for _, b, _ in u.moves}

    def write(self, block: int) -> None:
        number = next(self.numbers)
        for kv in self.kv:
            kv[block] = torch.tensor([(number + 37 * i) % 251 for i in range(kv.shape[1])])

    @rule(block=blocks)
    def compute(self, block: int) -> None:
        if block not in self.busy(Direction.STORE) | self.busy(Direction.LOAD):
            self.write(block)

    @rule(
        wanted=st.lists(st.tuples(keys, blocks), max_size=5, unique_by=lambda move: move[0]),
        refuse=st.sampled_from([False] * 5 + [True]),
    )
    def save(self, wanted: list[tuple[bytes, int]], refuse: bool) -> None:
        moves = [(k, b) for k, b in wanted if b not in self.busy(Direction.LOAD)]
        room = self.index.free + sum(block.pins == 0 for block in self.index)
        self.copies.refuse = refuse
        transfer = self.engine.save_blocks([k for k, _ in moves], [b for _, b in moves])
        assert transfer.blocks == min(len(moves), room)
        saved = [(k, b, Saved(next(self.numbers), self.bytes_of(b))) for k, b in moves]
        self.started(Direction.STORE, transfer, saved[: transfer.blocks], refuse)
        self.drop_evicted()

    @rule(
        wanted=st.lists(st.tuples(keys, blocks), max_size=5, unique_by=lambda move: move[1]),
        hits_only=st.booleans(),
        refuse=st.sampled_from([False] * 5 + [True]),
    )
    def load(self, wanted: list[tuple[bytes, int]], hits_only: bool, refuse: bool) -> None:
        busy = self.busy(Direction.STORE) | self.busy(Direction.LOAD)
        moves = [(k, b) for k, b in wanted if b not in busy]
        if hits_only:
            moves = [(k, b) for k, b in moves if k in self.there]
        request = [k for k, _ in moves], [b for _, b in moves]
        if any(k not in self.there for k in request[0]):
            copies = len(self.copies.tickets)
            with pytest.raises(BlockNotFoundError):
                self.engine.load_blocks(*request)
            assert len(self.copies.tickets) == copies
            return
        self.copies.refuse = refuse
        transfer = self.engine.load_blocks(*request)
        assert transfer.blocks == len(moves)
        self.started(Direction.LOAD, transfer, [(k, b, self.there[k]) for k, b in moves], refuse)

    @rule(ends=st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=4))
    def end(self, ends: list[tuple[int, bool]]) -> None:
        """Several copies end before anyone looks; about one in two well."""
        for number, well in ends:
            waiting = self.copies.waiting
            if waiting:
                ticket = waiting[number % len(waiting)]
                (ticket.finish if well else ticket.fail)()
        self.settle()

    @rule()
    def end_all_well(self) -> None:
        for ticket in self.copies.waiting:
            ticket.finish()
        self.settle()

    @rule(pick=st.integers(0, 9))
    def wait_in_vain(self, pick: int) -> None:
        if self.under:
            with pytest.raises(TimeoutError):
                self.under[pick % len(self.under)].transfer.wait(0)

    def started(
        self,
        direction: Direction,
        transfer: Transfer,
        moves: list[tuple[bytes, int, Saved]],
        refused: bool,
    ) -> None:
        self.copies.refuse = False
        if not moves:
            assert transfer.done
            return
        ticket = None if refused else self.copies.tickets[-1]
        self.under.append(Under(direction, transfer, ticket, moves))
        self.settle()

    def settle(self) -> None:
        """Take in what ended, as the engine does at its next call."""
        self.engine.stats()
        ended = [under for under in self.under if under.ended]
        if any(under.failed and under.direction is Direction.LOAD for under in ended):
            for under in self.under:
                under.discard |= under.direction is Direction.STORE
        self.under = [under for under in self.under if not under.ended]
        for under in ended:
            good = not under.failed and not under.discard
            self.past.append((under.transfer, good))
            if under.direction is Direction.LOAD:
                self.loaded(under, good)
            elif good:
                self.commit(under)

    def loaded(self, under: Under, good: bool) -> None:
        for key, block, saved in under.moves:
            if good:
                assert self.bytes_of(block) == saved.data
            elif self.there.get(key) == saved:
                del self.there[key]
        if not good:
            for _, block, _ in under.moves:
                self.write(block)

    def commit(self, under: Under) -> None:
        for key, _, saved in under.moves:
            if saved.number > self.newest.get(key, 0):
                self.there[key] = saved
                self.newest[key] = saved.number

    def drop_evicted(self) -> None:
        shown = dict(zip(KEYS, self.engine.check_blocks(KEYS), strict=True))
        left = {key: saved for key, saved in self.there.items() if shown[key]}
        self.evictions += len(self.there) - len(left)
        self.there = left

    @invariant()
    def only_the_policy_takes_keys_away(self) -> None:
        stats = self.engine.stats()
        shown = [k for k, there in zip(KEYS, self.engine.check_blocks(KEYS), strict=True) if there]
        assert shown == sorted(self.there)
        assert stats["resident_slots"] == len(shown)
        assert stats["evicted_blocks"] == self.evictions

    @invariant()
    def slots_are_conserved(self) -> None:
        stats = self.engine.stats()
        parts = [stats[f"{name}_slots"] for name in ("free", "reserved", "resident")]
        assert sum(parts) == stats["total_slots"]
        assert min(parts) >= 0
        self.index.check()
        if not self.under:
            assert stats["reserved_slots"] == 0
            assert all(block.pins == 0 for block in self.index)

    @invariant()
    def transfers_tell_the_truth(self) -> None:
        assert not any(under.transfer.done for under in self.under)
        for transfer, good in self.past:
            assert transfer.done
            if good:
                assert transfer.wait() == transfer.blocks
            else:
                with pytest.raises(TransferError):
                    transfer.wait()
        self.past = self.past[-3:]

    def teardown(self) -> None:
        """Whatever was saved last loads, byte for byte; shutdown lets the rest end."""
        if not hasattr(self, "engine"):
            return
        self.end_all_well()
        for key, saved in self.there.items():
            transfer = self.engine.load_blocks([key], [0])
            self.copies.tickets[-1].finish()
            assert transfer.wait() == 1
            assert self.bytes_of(0) == saved.data
        left = self.engine.save_blocks([b"last"], [0])
        self.engine.shutdown()
        assert left.wait() == left.blocks == 1


@pytest.mark.fuzz
@pytest.mark.parametrize("policy", policy_names())
def test_engine_equals_a_dict_of_bytes(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "kvortex")
    machine = type(f"EngineMachine_{policy}", (EngineMachine,), {"policy": policy})
    run_state_machine_as_test(machine, settings=budget(30))
