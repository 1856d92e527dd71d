"""HostPool: slots in one piece of memory, and refusals that say how much there is."""

from __future__ import annotations

import errno
import logging
import mmap
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registrations import Registrations

from kvortex.config import GIB
from kvortex.core import Direction, PoolAllocationError
from kvortex.host_memory import HostMemory
from kvortex.host_pool import HostPool, slots_of_a_piece
from kvortex.layout import make_layout

MIB = 1 << 20
SLOT = 64 << 10
PIECE = 16
"""Slots of a piece where pieces are made small."""


@pytest.fixture
def pinned(device: torch.device) -> bool:
    return device.type == "cuda"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_slots_are_one_piece_of_memory(pinned: bool) -> None:
    with HostPool(5, 48, pinned) as pool:
        assert pool.bytes.shape == (5, 48)
        assert pool.bytes.stride() == (48, 1)
        assert pool.bytes.dtype is torch.uint8
        assert pool.bytes.data_ptr() == pool.address
        assert pool.address % 4096 == 0
        assert (pool.num_slots, pool.slot_bytes) == (5, 48)
        pool.bytes.copy_(torch.arange(240, dtype=torch.uint8).view(5, 48))
        assert pool.bytes[4, 47] == 239


def test_pinned_exactly_if_asked(pinned: bool) -> None:
    with HostPool(5, 1 << 20, pinned) as pool:
        assert pool.bytes.is_pinned() is pinned
        address = pool.address
    assert pool.address == address


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_reads_and_writes_the_whole_pool() -> None:
    with HostPool(3, (300 << 20) + 16, pinned=True) as pool:
        pool.bytes[:, -1] = torch.tensor([1, 2, 3], dtype=torch.uint8)
        assert pool.bytes.to("cuda")[:, -1].tolist() == [1, 2, 3]
        pool.bytes.copy_(torch.full(pool.bytes.shape, 7, dtype=torch.uint8, device="cuda"))
        assert pool.bytes.eq(7).all()


@pytest.fixture
def pins(monkeypatch: pytest.MonkeyPatch) -> Registrations:
    """Pieces are of PIECE slots, and registered in a list."""
    monkeypatch.setattr("kvortex.host_pool.PIECE_BYTES", PIECE * SLOT)
    return Registrations(monkeypatch)


def of_pool() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("kvortex-")]


def let_it_end(pool: HostPool) -> None:
    assert pool._preparation is not None
    pool._preparation._thread.join()


def test_the_first_piece_is_ready_while_the_others_are_made(pins: Registrations) -> None:
    pins.hold_at = 2
    with HostPool(5 * PIECE - 3, SLOT, pinned=True) as pool:
        assert pool.piece_slots == PIECE
        assert pool.num_slots == 5 * PIECE - 3
        assert pins.held.wait(60)
        assert pool.num_ready_slots == 2 * PIECE
        assert pool.pinned_bytes == 2 * PIECE * SLOT + pool.checksums.nbytes
        pool.bytes[: pool.num_ready_slots].fill_(7)
        pins.go.set()
        pool.wait_until_ready()
        assert pool.num_ready_slots == pool.num_slots == 5 * PIECE - 3
        assert pool.pinned_bytes == pool.bytes.numel() + pool.checksums.nbytes
        assert pool.bytes[: 2 * PIECE].eq(7).all()
        starts = [pool.address + i * PIECE * SLOT for i in range(5)]
        pieces = dict(zip(starts, [PIECE * SLOT] * 4 + [13 * SLOT], strict=True))
        assert pins.now == {pool.checksums.data_ptr(): pool.checksums.nbytes, **pieces}
    assert pins.now == {}
    assert of_pool() == []


def test_slots_only_become_more(pins: Registrations) -> None:
    seen: list[int] = []
    with HostPool(40 * PIECE, SLOT, pinned=True) as pool:
        while not seen or seen[-1] < pool.num_slots:
            seen.append(pool.num_ready_slots)
    assert seen == sorted(seen)
    assert seen[0] >= PIECE
    assert {number % PIECE for number in seen} == {0}


def test_unpinned_memory_is_ready_at_once() -> None:
    with HostPool(1 << 14, SLOT, pinned=False) as pool:
        assert pool.num_ready_slots == pool.num_slots == 1 << 14
        pool.wait_until_ready()
        assert pool.pinned_bytes == 0


def test_a_pool_stays_at_what_could_be_prepared(
    pins: Registrations, caplog: pytest.LogCaptureFixture
) -> None:
    pins.refuse_at = 3
    before = resident_bytes()
    with HostPool(64 * PIECE, SLOT, pinned=True) as pool:
        let_it_end(pool)
        assert pool.num_slots == pool.num_ready_slots == 3 * PIECE
        assert pool.pinned_bytes == 3 * PIECE * SLOT + pool.checksums.nbytes
        assert resident_bytes() - before < 4 * PIECE * SLOT
    (record,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "Only 0.0029 of 0.062 GiB of host memory: out of memory."
    assert pins.now == {}


def test_who_needs_all_of_it_gets_an_error(pins: Registrations) -> None:
    pins.refuse_at = 3
    pool = HostPool(64 * PIECE, SLOT, pinned=True)
    with pytest.raises(PoolAllocationError, match=r"cannot pin 0\.1 GiB .* \(out of memory\)"):
        pool.wait_until_ready()
    assert pins.now == {}
    assert pool.bytes.numel() == 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", [MemoryError("none left"), ValueError("none left")])
def test_nobody_waits_for_a_preparation_that_ended_in_whatever_way(
    pins: Registrations, monkeypatch: pytest.MonkeyPatch, what: Exception
) -> None:
    def populate(*_: object) -> None:
        raise what

    monkeypatch.setattr("kvortex.host_memory.HostMemory.populate", populate)
    with pytest.raises(PoolAllocationError, match="none left"):
        HostPool(64 * PIECE, SLOT, pinned=True)
    assert pins.now == {}
    assert of_pool() == []


def test_nothing_can_be_prepared(pins: Registrations, caplog: pytest.LogCaptureFixture) -> None:
    pins.refuse_at = 0
    with pytest.raises(PoolAllocationError, match=r"out of memory.*lower ram_pool_gb"):
        HostPool(64 * PIECE, SLOT, pinned=True)
    assert pins.now == {}
    assert of_pool() == []
    assert caplog.records == []


@pytest.mark.parametrize("cores", [1, 3, 64])
@pytest.mark.parametrize("last", [1, 700, 4096])
def test_every_page_is_populated_once(
    cores: int, last: int, pins: Registrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("kvortex.host_pool.PIECE_BYTES", 4096 * SLOT)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(HostMemory, "populate", lambda _, *part: asked.append(part))
    with HostPool(4096 + last, SLOT, pinned=True) as pool:
        pool.wait_until_ready()
        size = pool.bytes.numel()
    asked.sort()
    ends = [start + nbytes for start, nbytes in asked]
    assert [start for start, _ in asked] == [0, *ends[:-1]]
    assert ends[-1] == size


def test_pages_run_out(pins: Registrations, monkeypatch: pytest.MonkeyPatch) -> None:
    populate = HostMemory.populate

    def short(memory: HostMemory, start: int, nbytes: int) -> None:
        if start >= 2 * PIECE * SLOT:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        populate(memory, start, nbytes)

    monkeypatch.setattr(HostMemory, "populate", short)
    with HostPool(64 * PIECE, SLOT, pinned=True) as pool:
        let_it_end(pool)
        assert pool.num_slots == 2 * PIECE


def test_closed_while_it_prepares(pins: Registrations) -> None:
    pins.hold_at = 2
    pool = HostPool(64 * PIECE, SLOT, pinned=True)
    assert pins.held.wait(60)
    threading.Timer(0.05, pins.go.set).start()
    pool.close()
    assert pins.count <= 4
    assert pins.now == {}
    assert pool.pinned_bytes == 0
    assert of_pool() == []
    pool.close()


@pytest.mark.fuzz
@given(st.integers(1, 4096).map(lambda n: 16 * n) | st.integers(1, 1 << 25).map(lambda n: 16 * n))
def test_pieces_are_whole_slots_and_whole_pages(slot_bytes: int) -> None:
    slots = slots_of_a_piece(slot_bytes)
    size, least = slots * slot_bytes, np.lcm(slot_bytes, mmap.PAGESIZE)
    assert size % mmap.PAGESIZE == 0
    assert size == least or 128 * MIB < size <= 256 * MIB


def test_an_unknown_node_is_no_obstacle(caplog: pytest.LogCaptureFixture) -> None:
    with HostPool(4, SLOT, pinned=False, node=1000) as pool:
        assert pool.bytes.fill_(1).eq(1).all()
    assert len(caplog.records) == 1


def test_placement_is_told(
    pins: Registrations, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvortex.host_pool.prefer_node", lambda *_: True)
    placed = {0: 0.25, 1: 0.75}
    monkeypatch.setattr("kvortex.host_pool.nodes_of", lambda *_: placed)
    with HostPool(2 * PIECE, SLOT, pinned=True, node=1) as pool:
        let_it_end(pool)
    (record,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == ("Host memory for NUMA node 1 is 25% on node 0, 75% on node 1.")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mover", ["zero-copy", "staged", "dma"])
def test_copies_over_many_pieces(mover: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks, whose slots are neighbours over the ends of pieces."""
    from kvortex.calibration import Calibration, Choice
    from kvortex.cuda_copy_engine import CudaCopyEngine

    monkeypatch.setattr("kvortex.host_pool.PIECE_BYTES", MIB)
    chosen = Calibration({4096: dict.fromkeys(Direction, Choice(mover, mover, 0, 0, 8))}, "a test")
    monkeypatch.setattr("kvortex.cuda_copy_engine.load_calibration", lambda device: chosen)
    kv = torch.randint(0, 255, (333, 3 * SLOT), dtype=torch.uint8, device="cuda")
    before, layout = kv.clone(), make_layout({"a": kv})
    with HostPool(333, layout.slot_bytes, pinned=True) as pool:
        pool.wait_until_ready()
        assert pool.piece_slots == 5
        engine = CudaCopyEngine(layout, pool, 4)
        numbers = np.arange(333)
        assert engine.copy(Direction.STORE, numbers, numbers).wait()
        assert torch.equal(pool.bytes, before.cpu())
        kv.zero_()
        assert engine.copy(Direction.LOAD, numbers, numbers).wait()
        assert torch.equal(kv, before)
        engine.close()


def test_closed_twice(pinned: bool) -> None:
    pool = HostPool(5, 48, pinned)
    pool.close()
    pool.close()
    assert pool.bytes.shape == (0, 48)


def test_close_gives_memory_back(pinned: bool) -> None:
    before = resident_bytes()
    with HostPool(64, 1 << 20, pinned) as pool:
        pool.bytes.fill_(1)
        assert resident_bytes() - before > 60 << 20
    assert resident_bytes() - before < 30 << 20


def test_a_view_outlives_close(pinned: bool) -> None:
    with HostPool(5, 48, pinned) as pool:
        view = pool.bytes[2].fill_(9)
    assert view.eq(9).all()


def test_context_manager_closes_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), HostPool(5, 48, pinned=False) as pool:
        assert pool.bytes[1 // 0] is None
    assert pool.bytes.shape == (0, 48)


@pytest.mark.parametrize("num_slots", [1 << 40, 1 << 62])
def test_more_than_can_be_allocated(num_slots: int) -> None:
    with pytest.raises(PoolAllocationError) as caught:
        HostPool(num_slots, 1 << 20, pinned=False)
    message = str(caught.value)
    assert message.startswith(
        f"cannot allocate {num_slots * (1 << 20) / GIB:.1f} GiB of host memory"
    )
    assert re.search(r": [\d.]+ GiB are free, ulimit -l is (unlimited|[\d.]+ GiB); ", message)
    assert message.endswith("lower ram_pool_gb")
    assert isinstance(caught.value, MemoryError)
