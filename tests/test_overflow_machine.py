"""Scheduler, workers and real disk stores against a dict of bytes: faults, resets, restarts."""

from __future__ import annotations

import errno
import itertools
import random
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack
from functools import reduce
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from disks import NAMESPACE, Faults, is_whole, seal, verified_by
from doubles import CommandedCopyEngine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import kvortex.disk.breaker
from kvortex.block import State
from kvortex.core import StepReport
from kvortex.disk import DiskOptions, DiskStore
from kvortex.disk.checksums import scheme_of
from kvortex.disk_worker import DiskWorker
from kvortex.host_pool import HostPool
from kvortex.layout import make_layout
from kvortex.policies import ADMISSIONS, BUILT_IN, Place
from kvortex.scheduler import OffloadScheduler
from kvortex.tiers import HostTier
from kvortex.worker import Worker

if TYPE_CHECKING:
    from kvortex.core import StepPlan
    from kvortex.moves_under_way import MoveUnderWay

NUM_BLOCKS = 8
SIZES = (112, 48)
SLOT_BYTES = sum(SIZES)
CHAINS = [[b"%d/%d" % (chain, place) for place in range(6)] for chain in range(3)]
"""Keys of three prompts, each block with the one before."""
PARENTS = {key: before for keys in CHAINS for before, key in itertools.pairwise(keys)}
SEEDED = verified_by("the CPU", SLOT_BYTES)
EPOCH_0 = 0
chains, lengths = st.sampled_from(CHAINS), st.integers(1, 6)
a_few = st.sampled_from([0, 1, 3])
rarely = st.sampled_from([False, False, True])
names = st.sampled_from(["r", "s", "t"])
ranks = st.integers(0, 1)
errors = st.sampled_from([errno.EIO, errno.ENOSPC, errno.EROFS])


def right(key: bytes, epoch: int, rank: int) -> bytes:
    """The only bytes that a block may have, as long as the weights are those of an epoch."""
    seed = blake2b(b"%s %d %d" % (key, epoch, rank), digest_size=8).digest()
    return random.Random(seed).randbytes(SLOT_BYTES)


def rank_folder(path: Path, number: int) -> Path:
    return path / NAMESPACE.digest(SLOT_BYTES, scheme_of(SEEDED)).hex() / f"rank-{number}"


class Rank:
    """One worker, its GPU, its pool and its disk."""

    def __init__(self, number: int, folder: Path, num_slots: int, disk_slots: int) -> None:
        self.number = number
        self.faults = Faults()
        self.folder = folder
        self.closing = ExitStack()
        views = {
            str(i): torch.zeros(NUM_BLOCKS, size, dtype=torch.uint8) for i, size in enumerate(SIZES)
        }
        self.gpu = list(views.values())
        layout = make_layout(views)
        assert layout.slot_bytes == SLOT_BYTES
        self.pool = self.closing.enter_context(HostPool(num_slots, SLOT_BYTES, pinned=False))
        self.store = self.closing.enter_context(
            DiskStore(
                folder,
                NAMESPACE,
                number,
                disk_slots,
                self.pool,
                DiskOptions(readers=2, writers=2, read_deadline_s=60.0),
                SEEDED,
                self.faults.open_file,
            )
        )
        self.copies = CommandedCopyEngine(layout, self.pool)
        self.worker = Worker(self.copies, DiskWorker(self.store))

    def compute(self, block: int, data: bytes) -> None:
        at = 0
        for view in self.gpu:
            size = view.shape[1]
            view[block] = torch.frombuffer(bytearray(data[at : at + size]), dtype=torch.uint8)
            at += size

    def on_gpu(self, block: int) -> bytes:
        return b"".join(view[block].numpy().tobytes() for view in self.gpu)

    def in_host(self, slot: int) -> bytes:
        return self.pool.bytes[slot].numpy().tobytes()

    def let_disk_end(self) -> None:
        """Unless the drive hangs, all that it was given has ended."""
        while self.faults.flows.is_set() and self.busy():
            assert self.store.wait(20)
            self.store._take_answers()

    def busy(self) -> bool:
        return bool(self.store._jobs or self.store._erasures._erasing)

    def close(self) -> list[tuple[str, int, bytes]]:
        """Returns what the drive had not been told to keep."""
        self.faults.flows.set()
        self.let_disk_end()
        unsynced = list(self.faults.unsynced)
        self.closing.close()
        return unsynced

    def cut_power(self, draw: random.Random) -> None:
        self.faults.unsynced = self.close()  # there was no orderly end
        self.faults.cut_power(rank_folder(self.folder, self.number), draw)


class OverflowMachine(RuleBasedStateMachine):
    """The model: `right` has the bytes of each key in each epoch. A reset begins the next epoch,
    as if the weights were changed; a restart begins with the first one's again.

    Requests are played by `ask`, `take` and `leave`: to want blocks of a chain, to load what the
    host has of them, and to be gone.
    """

    num_ranks: ClassVar[int]
    seen: ClassVar[Counter[str]]

    @initialize(
        num_slots=st.sampled_from([8, 16, 4, 11]),
        disk_slots=st.sampled_from([16, 3, 32]),
        policy=st.sampled_from(["lru", "s3fifo"]),
        admission=st.sampled_from(["always", "tinylfu"]),
    )
    def start(self, num_slots: int, disk_slots: int, policy: str, admission: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="kvortex-"))
        self.sizes, self.policies = (num_slots, disk_slots), (policy, admission)
        self.open()
        for keys in CHAINS:
            for _ in range(2):  # some filters want to see it twice
                self.compute(keys, len(keys), touch=False, steps=3)

    def open(self) -> None:
        self.numbers = itertools.count()
        num_slots, disk_slots = self.sizes
        policy, admission = self.policies
        self.ranks = [Rank(n, self.path, num_slots, disk_slots) for n in range(self.num_ranks)]
        host, disk = (
            HostTier(size, BUILT_IN[policy](size), ADMISSIONS[admission](size))
            for size in self.sizes
        )
        self.offload = OffloadScheduler(host, self.num_ranks, SLOT_BYTES, disk)
        assert self.offload.overflow is not None
        self.overflow = self.offload.overflow
        self.epoch = EPOCH_0
        self.used: dict[int, set[int]] = {}
        """GPU blocks of jobs under way."""
        self.storing: dict[int, list[bytes]] = {}
        """Keys of each store's slots."""
        self.asked: dict[str, list[bytes]] = {}
        self.loading: dict[int, list[tuple[bytes, int, int]]] = {}
        """Of what epoch the bytes must be that arrive."""
        self.distrusted: set[bytes] = set()
        """Keys whose blocks the host forgot because their load failed."""
        self.void: set[int] = set()
        """Moves of what a reset forgot."""
        self.lost: set[bytes] = set()
        """Keys that a rank could not read, though others may not have answered yet."""

    # What an engine does

    @rule(keys=chains, length=lengths, touch=st.booleans(), steps=a_few)
    def compute(self, keys: list[bytes], length: int, touch: bool, steps: int) -> None:
        """A prompt was computed."""
        blocks = self.free_blocks()
        keys = keys[: min(length, len(blocks))]
        if touch:
            self.offload.touch(keys)
        wanted = [
            key
            for place, key in enumerate(keys)
            if self.offload.wants(key) and self.offload.admits(key, Place(place, length))
        ]
        blocks = blocks[: len(wanted)]
        for key, block in zip(wanted, blocks, strict=True):
            for rank in self.ranks:
                rank.compute(block, right(key, self.epoch, rank.number))
        job = self.offload.store(wanted, blocks, [PARENTS.get(key) for key in wanted])
        if job is not None:
            self.used[job.id] = set(job.block_ids.tolist())
            self.storing[job.id] = wanted[: len(job.slots)]
        self.go_on(steps)

    @rule(
        who=st.lists(names, min_size=1, unique=True),
        keys=chains,
        length=lengths,
        lost=st.sampled_from([16, 16, 4, 0]),
        steps=a_few,
        served=st.integers(0, 3),
    )
    def come_back(
        self, who: list[str], keys: list[bytes], length: int, lost: int, steps: int, served: int
    ) -> None:
        """Some requests for the same, mostly when the host has lost what it had."""
        self.go_on(2)
        self.crowd(lost)
        for name in who:
            self.ask(name, keys, length)
        self.go_on(steps)
        for name in who[:served]:
            self.take(name)

    def ask(self, name: str, keys: list[bytes], length: int) -> None:
        """A request waits for its turn; asked again, it goes on."""
        keys = self.asked.setdefault(name, keys[:length])
        fetch = self.overflow.fetches.of(name)
        if self.overflow.known and (fetch is None or fetch.short):
            fetch = self.overflow.fetches.begin(name, keys, [PARENTS.get(key) for key in keys])
        self.seen["short"] += fetch is not None and fetch.short
        self.seen["shared"] += any(
            len(read.fetches) > 1 for read in self.overflow.fetches.under_way
        )

    @rule(count=st.integers(1, 16))
    def crowd(self, count: int) -> None:
        """Others need the host, for blocks that do not come there in the end."""
        self.offload.tier.abort(self.offload.tier.reserve([b"%d" % n for n in range(count)]))

    @rule(name=names)
    def take(self, name: str) -> None:
        """Load what is in the host of what a request asked for."""
        keys = self.asked.pop(name, [])
        self.offload.touch(keys)
        there = [key for key in keys if self.offload.tier.lookup(key) is not None]
        blocks = self.free_blocks()[: len(there)]
        there = there[: len(blocks)]
        job = self.offload.load(there, blocks)
        if job is not None:
            self.used[job.id] = set(blocks)
            self.loading[job.id] = [
                (key, block, self.epoch) for key, block in zip(there, blocks, strict=True)
            ]
        self.leave(name)

    @rule(name=names)
    def leave(self, name: str) -> None:
        """Late, aborted, or served."""
        self.asked.pop(name, None)
        self.overflow.fetches.release(name)

    @rule(fail=st.sampled_from([None] * 5 + [0]))
    def step(self, fail: int | None = None) -> None:
        """A plan goes out, copies end, a report comes back."""
        plan = self.offload.take_plan(has_forward=False)
        for rank in self.ranks:
            rank.worker.begin(plan)
            rank.let_disk_end()
        self.end_copies(plan, fail)
        if fail is None:
            self.sum_up(plan)
        self.settle()

    def sum_up(self, plan: StepPlan) -> None:
        """Whoever copies leaves the checksum of each block beside its slot."""
        for job in plan.stores:
            for slot, key in zip(job.slots.tolist(), self.storing[job.id], strict=True):
                for rank in self.ranks:
                    seal(rank.pool, slot, key, SEEDED)

    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    @rule(really=rarely, keys=chains, sent=st.booleans(), restart=st.booleans())
    def reset(self, really: bool, keys: list[bytes], sent: bool, restart: bool) -> None:
        """The weights are others now, while a request waits and a drive does not answer."""
        if not really:
            return
        self.crowd(16)
        self.ask("r", keys, len(keys))
        if sent:
            self.ranks[0].faults.flows.clear()
            self.step()
        self.seen["resets under way"] += self.overflow.num_pending > 0
        self.void |= {one.move.id for one in self.moves()}
        self.offload.reset()
        self.epoch += 1
        if restart:  # with what was computed since
            self.let_drives_work()
            self.compute(keys, len(keys), touch=True, steps=3)
            self.restart(really=True, seed=None)

    # What drives do

    @precondition(lambda self: all(rank.faults.error is None for rank in self.ranks))
    @rule(rank=ranks, code=errors, writes_only=st.booleans())
    def break_drive(self, rank: int, code: int, writes_only: bool) -> None:
        faults = self.ranks[rank % self.num_ranks].faults
        faults.error, faults.writes_only = code, writes_only
        self.compute([b"new %d" % next(self.numbers)], 1, touch=True, steps=3)

    @rule(rank=ranks, error=rarely, short=st.booleans(), hangs=rarely)
    def change(self, rank: int, error: bool, short: bool, hangs: bool) -> None:
        """The drive is mended, or not; moves little at once, or not; answers, or not."""
        faults = self.ranks[rank % self.num_ranks].faults
        faults.error = faults.error if error else None
        faults.short = short
        (faults.flows.clear if hangs else faults.flows.set)()

    @rule(rank=ranks, at=st.integers(0, 32 * 4096 - 1))
    def corrupt(self, rank: int, at: int) -> None:
        number = rank % self.num_ranks
        where = rank_folder(self.path, number) / "slots"
        with where.open("r+b") as file:
            file.seek(at % (self.sizes[1] * 4096) // 4096 * 4096 + at % SLOT_BYTES)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 0x40]))

    @rule(keys=chains, length=lengths, steps=a_few, again=rarely, restart=rarely)
    def distrust(
        self, keys: list[bytes], length: int, steps: int, again: bool, restart: bool
    ) -> None:
        """A load found what is on disk, or on its way, corrupt: it stays nowhere."""
        keys = keys[:length]
        if again:  # while it is written, after the same befell what was there
            self.distrust(keys, length, 2, again=False, restart=False)
            self.let_drives_work()
            self.ranks[0].faults.flows.clear()
            self.compute(keys, length, touch=True, steps=3)
        written = {key for one in self.overflow.write_behind.under_way for key in one.move.keys}
        on_disk = {key for key in keys if self.overflow.disk.lookup(key) is not None}
        self.seen["distrusted while written"] += bool(written & set(keys))
        found = [self.offload.tier.lookup(key) for key in keys]
        self.offload.tier.forget([block for block in found if block is not None])
        self.distrusted |= set(keys)
        self.overflow.distrust(keys)
        if again:
            self.let_drives_work()
        assert not on_disk & set(self.overflow.disk.readable)  # type: ignore[call-overload]
        self.go_on(steps)
        works = all(r.faults.error is None and r.faults.flows.is_set() for r in self.ranks)
        if restart and works:
            self.restart_without(on_disk | written & set(keys))

    def restart_without(self, distrusted: set[bytes]) -> None:
        """What was not written anew since is not found by the next life."""
        for _ in range(100):
            if not self.overflow.pending:
                break
            self.step()
        anew = set(self.overflow.disk.readable)  # type: ignore[call-overload]
        self.restart(really=True, seed=None)
        self.step()
        assert not (distrusted - anew) & set(self.overflow.disk.readable)  # type: ignore[call-overload]
        self.seen["distrusted before a restart"] += bool(distrusted)

    @rule(really=rarely, seed=st.one_of(st.none(), st.integers(0, 1 << 16)))
    def restart(self, really: bool, seed: int | None) -> None:
        """In good order, or after a power cut."""
        if not really:
            return
        for rank in self.ranks:
            if seed is None:
                rank.close()
            else:
                rank.cut_power(random.Random(seed + rank.number))
        self.seen["restarts"] += 1
        self.open()

    # How it is done

    def free_blocks(self) -> list[int]:
        busy = set().union(*self.used.values())
        return [block for block in range(NUM_BLOCKS) if block not in busy]

    def end_copies(self, plan: StepPlan, fail: int | None) -> None:
        """In a load that ends well are the bytes of its keys, on every rank."""
        for rank in self.ranks:
            for ticket in rank.copies.waiting:
                (ticket.finish if fail is None else ticket.fail)()
        for job in plan.loads if fail is not None else []:
            self.distrusted |= {key for key, _, _ in self.loading[job.id]}
        for job in plan.loads:
            for key, block, epoch in self.loading.pop(job.id) if fail is None else []:
                for rank in self.ranks:
                    assert rank.on_gpu(block) == right(key, epoch, rank.number)
                self.seen["loaded"] += 1

    def settle(self) -> None:
        before = set(self.overflow.disk.readable)  # type: ignore[call-overload]
        reports = [rank.worker.report() for rank in self.ranks]
        report = reduce(StepReport.merge, reports)
        for move_id, positions in (report.disk.lost if report.disk is not None else {}).items():
            (one,) = (one for one in self.moves() if one.move.id == move_id)
            self.lost |= {one.move.keys[position] for position in positions}
        for flight in self.offload.settle(report):
            self.used.pop(flight.job.id)
        gone = before - set(self.overflow.disk.readable)  # type: ignore[call-overload]
        assert gone <= self.lost, "the disk forgot a key for no reason"

    @invariant()
    def what_is_readable_is_right(self) -> None:
        if not hasattr(self, "offload"):
            return
        for block in self.offload.tier.index:
            for rank in self.ranks:
                assert rank.in_host(block.slot) == right(block.key, self.epoch, rank.number)
                assert is_whole(rank.pool, block.slot, block.key, SEEDED)

    @invariant()
    def slots_are_conserved(self) -> None:
        if not hasattr(self, "offload"):
            return
        for tier in (self.offload.tier, self.overflow.disk):
            tier.index.check()
        assert self.overflow.fetches._room >= 0
        writes = self.overflow.write_behind
        assert writes._writing <= writes._most_writing
        assert len(writes._waiting) <= self.sizes[0]

    @invariant()
    def a_key_that_moves_is_somewhere(self) -> None:
        """The source is readable as long as the move goes on, unless it was given up."""
        if not hasattr(self, "offload"):
            return
        reads, writes = self.overflow.fetches.under_way, self.overflow.write_behind.under_way
        sources = [(one.move, one.on_disk) for one in reads]
        sources += [(one.move, one.in_host) for one in writes]
        for move, source in sources:
            assert all(block.pins for block in source)
            for key, block in zip(move.keys, source, strict=True):
                forgotten = move.id in self.void or key in self.distrusted
                assert forgotten or (
                    block.state is State.RESIDENT and key in self.overflow.readable
                )

    def moves(self) -> list[MoveUnderWay]:
        return [*self.overflow.fetches.under_way, *self.overflow.write_behind.under_way]

    def let_drives_work(self) -> None:
        for rank in self.ranks:
            rank.faults.flows.set()
            rank.faults.error = None

    def rest(self) -> None:
        """Everybody leaves, and all that is under way ends."""
        self.let_drives_work()
        for name in list(self.asked):
            self.leave(name)
        for _ in range(100):
            self.step()
            if not self.offload.pending:
                break
        assert not self.offload.pending, "something never ends"
        for tier in (self.offload.tier, self.overflow.disk):
            assert tier.index.reserved == 0
            assert all(block.pins == 0 for block in tier.index)
        assert self.overflow.fetches._room == self.overflow.fetches._most_held
        assert not self.overflow.fetches._reading
        assert not self.overflow.write_behind._writing
        assert not self.used

    def read_all_of_the_disk(self) -> None:
        """What the disk says that it has can be fetched, and is right."""
        for key in sorted(self.overflow.disk.readable):  # type: ignore[call-overload]
            if self.offload.tier.lookup(key) is None:
                self.overflow.fetches.begin("reader", [key], [None])
                self.step()
                self.step()
                self.what_is_readable_is_right()
                self.seen["read at the end"] += self.offload.tier.lookup(key) is not None
                self.overflow.fetches.release("reader")

    def teardown(self) -> None:
        if not hasattr(self, "offload"):
            return
        try:
            self.rest()
            self.read_all_of_the_disk()
            self.rest()
            self.seen.update(
                {k: n for k, n in self.offload.counters.as_dict().items() if isinstance(n, int)}
            )
        finally:
            for rank in self.ranks:
                rank.close()
            shutil.rmtree(self.path)


@pytest.mark.fuzz
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_host_and_disk_equal_a_dict_of_bytes(
    num_ranks: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "kvortex")
    monkeypatch.setattr(kvortex.disk.breaker, "ERRORS_IN_A_ROW", 1 << 30)  # another test's matter
    seen = Counter[str]()
    members = {"num_ranks": num_ranks, "seen": seen}
    machine = type(f"OverflowMachine_{num_ranks}", (OverflowMachine,), members)
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=30))
    reached = ["loaded", "shared", "short", "restarts", "resets under way", "read at the end"]
    reached += ["distrusted while written", "distrusted before a restart"]
    reached += ["disk_survivors", "disk_missed_writes", "disk_failed_writes", "disk_failed_reads"]
    assert [what for what in reached if not seen[what]] == []
