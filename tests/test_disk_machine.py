"""DiskStore against a dict of bytes: faults, corruption, restarts and power cuts at any step."""

from __future__ import annotations

import errno
import itertools
import random
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
from budget import budget
from disks import (
    KINDS,
    NAMESPACE,
    SLOT_BYTES,
    Faults,
    all_ended,
    block_bytes,
    content,
    fill,
    is_whole,
    opened,
    seal,
    verified_by,
)
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import kvortex.disk.breaker
from kvortex.disk.checksums import scheme_of

if TYPE_CHECKING:
    from kvortex.verification import Verification

NUM_SLOTS = 5
KEYS = [b"a", b"b", b"c", b"d"]
slots = st.integers(0, NUM_SLOTS - 1)
several = st.lists(st.tuples(slots, st.sampled_from(KEYS)), max_size=4, unique_by=lambda s: s[0])
errors = st.sampled_from([errno.EIO, errno.ENOSPC, errno.EROFS])


class DiskMachine(RuleBasedStateMachine):
    """The model: `sure` is what must be read, `gone` are slots that must hold nothing, `ever` has
    all that was ever written to a slot.

    What may be read of a slot under a key is only what was written there under it; of what a fault
    or a power cut touched, it may be nothing. What a load would not take, because it does not agree
    with the checksum that came with it, was not read.
    """

    verification: ClassVar[Verification | None]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvortex-"))
        self.faults = Faults()
        self.sure: dict[int, tuple[bytes, int]] = {}
        self.ever: dict[tuple[int, bytes], set[int]] = {}
        self.gone: set[int] = set()
        self.numbers = itertools.count(1)
        self.jobs = itertools.count(1)
        self.draw = random.Random(0)
        self.open()

    def open(self) -> None:
        self.opened = ExitStack()
        self.outlives = True
        self.store, self.pool = self.opened.enter_context(
            opened(
                self.folder,
                NUM_SLOTS,
                verification=self.verification,
                open_file=self.faults.open_file,
            )
        )
        found = self.store.survivors
        assert len(set(found.keys)) == len(found.keys)
        there = dict(zip(found.slots.tolist(), found.keys, strict=True))
        assert not self.gone & set(there)
        for slot, (key, version) in list(self.sure.items()):
            newer = [s for s, (k, v) in self.sure.items() if k == key and v > version]
            if newer or self.unsure_of(key, version):
                del self.sure[slot]
            else:
                assert there[slot] == key

    @property
    def rank_folder(self) -> Path:
        digest = NAMESPACE.digest(SLOT_BYTES, scheme_of(self.verification))
        return self.folder / digest.hex() / "rank-0"

    def unsure_of(self, key: bytes, version: int) -> bool:
        """Whether a later write of the key may have survived in a slot that we are not sure of."""
        return any(
            max(versions) > version
            for (slot, k), versions in self.ever.items()
            if k == key and slot not in self.sure and slot not in self.gone
        )

    @rule(blocks=several)
    def write(self, blocks: list[tuple[int, bytes]]) -> None:
        versions = [next(self.numbers) for _ in blocks]
        for (slot, key), version in zip(blocks, versions, strict=True):
            fill(self.pool, slot, block_bytes(key, version))
            seal(self.pool, slot, key, self.verification)
            self.ever.setdefault((slot, key), set()).add(version)
            self.sure.pop(slot, None)
            self.gone.discard(slot)
        job, places = next(self.jobs), [slot for slot, _ in blocks]
        self.store.write(job, [key for _, key in blocks], places, places)
        failed = all_ended(self.store, job)[job]
        assert not failed or self.faults.error is not None
        for at, ((slot, key), version) in enumerate(zip(blocks, versions, strict=True)):
            if at not in failed:
                self.sure[slot] = key, version

    @rule(blocks=several)
    def read(self, blocks: list[tuple[int, bytes]]) -> None:
        self.pool.bytes.fill_(0xEE)
        self.pool.checksums.fill_(0xEE)
        job, host = next(self.jobs), list(range(len(blocks)))
        self.store.read(job, [key for _, key in blocks], [slot for slot, _ in blocks], host)
        failed = all_ended(self.store, job)[job]
        for at, (slot, key) in enumerate(blocks):
            if at not in failed and is_whole(self.pool, at, key, self.verification):
                self.check(slot, key, content(self.pool, at))
            elif at not in failed:
                assert self.verification is not None
                assert self.verification.by_gpu
                assert slot not in self.sure
            elif self.faults.error is None or self.faults.writes_only:
                assert self.sure.get(slot, (None, 0))[0] != key

    def check(self, slot: int, key: bytes, found: bytes) -> None:
        assert slot not in self.gone
        known = self.sure.get(slot)
        if known is not None:
            assert known[0] == key
            assert found == block_bytes(*known)
        else:
            assert found in {block_bytes(key, v) for v in self.ever.get((slot, key), set())}

    @rule(forgotten=st.sets(slots, max_size=3))
    def erase(self, forgotten: set[int]) -> None:
        self.store.erase(forgotten)
        self.forget(forgotten)

    @rule()
    def clear(self) -> None:
        """What is written from now on may not survive."""
        self.store.clear()
        self.forget(set(range(NUM_SLOTS)))
        self.outlives = False

    def forget(self, forgotten: set[int]) -> None:
        """They hold nothing from now on; where the drive works, also after a restart."""
        for slot in forgotten:
            self.sure.pop(slot, None)
        while self.faults.error is None and self.erases():
            self.store.wait(0.01)
            self.store.poll()
        if self.faults.error is None:
            self.gone |= forgotten

    def erases(self) -> bool:
        left = self.store._erasures
        return bool(left._unerased or left._erasing or left._to_wipe or left._wiping)

    @rule(slot=slots, at=st.integers(0, SLOT_BYTES - 1))
    def corrupt(self, slot: int, at: int) -> None:
        path = self.rank_folder / "slots"
        with path.open("r+b") as file:
            file.seek(slot * SLOT_BYTES + at)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 0x40]))
        self.sure.pop(slot, None)

    @precondition(lambda self: self.faults.error is None)
    @rule(code=errors, writes_only=st.booleans())
    def break_drive(self, code: int, writes_only: bool) -> None:
        self.faults.error, self.faults.writes_only = code, writes_only

    @rule()
    def mend_drive(self) -> None:
        self.faults.error = None

    @rule(short=st.booleans(), delay=st.sampled_from([0.0, 0.0, 0.002]))
    def slow_drive(self, short: bool, delay: float) -> None:
        self.faults.short, self.faults.delay = short, delay

    @rule()
    def restart(self) -> None:
        self.opened.close()
        self.faults.error = None
        if not self.outlives:
            self.sure.clear()
        self.open()

    @rule(seed=st.integers(0, 1 << 16))
    def cut_power(self, seed: int) -> None:
        lost = list(self.faults.unsynced)
        self.opened.close()
        self.faults.unsynced[:] = lost  # there was no orderly end
        self.faults.cut_power(self.rank_folder, random.Random(seed))
        self.faults.error = None
        self.sure.clear()
        self.gone.clear()
        self.open()

    @invariant()
    def counts_add_up(self) -> None:
        counters = self.store.counters
        assert counters.read_bytes == counters.read_blocks * SLOT_BYTES
        assert counters.written_bytes == counters.written_blocks * SLOT_BYTES
        assert not self.store.poll().ended

    def teardown(self) -> None:
        self.opened.close()
        shutil.rmtree(self.folder)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_moves_and_faults(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvortex.disk.breaker, "ERRORS_IN_A_ROW", 1 << 30)  # another test's matter
    members = {"verification": verified_by(kind)}
    machine = type(f"DiskMachine_{KINDS.index(kind)}", (DiskMachine,), members)
    run_state_machine_as_test(machine, settings=budget(40, stateful_step_count=25))
