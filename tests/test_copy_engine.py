"""Every CopyEngine keeps one contract: exact bytes, in the order of the caller's stream."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from geometries import GEOMETRIES, Geometry, dense, memory_of, naive_copy, noise

from kvortex.copy_engine import CopyEngine, CpuCopyEngine
from kvortex.core import Direction, TransferError
from kvortex.host_pool import HostPool
from kvortex.layout import make_layout
from kvortex.worker import open_copy_engine

if torch.cuda.is_available():
    from kvortex.cuda_copy_engine import CudaCopyEngine
    from kvortex.id_ring import MANY
    from kvortex.tune import rig

STORE, LOAD = Direction.STORE, Direction.LOAD
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
Open = Callable[..., CopyEngine]
SLEEP_CYCLES = 200_000_000
"""About 0.1 s of a GPU, ages for the small copies behind it."""


@pytest.fixture
def open_engine(device: torch.device) -> Iterator[Open]:
    """Engines over given tensors, with noise in the slots."""
    with ExitStack() as stack:

        def opened(
            tensors: dict[str, torch.Tensor],
            num_slots: int = 6,
            num_streams: int = 4,
            num_blocks: int | None = None,
        ) -> CopyEngine:
            layout = make_layout(tensors, num_blocks)
            pool = HostPool(num_slots, layout.slot_bytes, pinned=device.type == "cuda")
            stack.callback(pool.close)
            engine = open_copy_engine(layout, pool, num_streams)
            stack.callback(engine.close)
            pool.bytes.copy_(noise(pool.bytes.numel(), torch.device("cpu"), 5).view_as(pool.bytes))
            return engine

        yield opened


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def contents(engine: CopyEngine) -> list[torch.Tensor]:
    kv = [memory_of(page.view).cpu().clone() for page in engine.layout.pages]
    return [engine.pool.bytes.clone(), *kv]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: geometry.name)
@pytest.mark.parametrize("num_streams", [1, 4])
def test_there_and_back(
    geometry: Geometry, num_streams: int, device: torch.device, open_engine: Open
) -> None:
    tensors, loops = geometry.make(device), geometry.make(device)
    untouched = [memory_of(tensor).clone() for tensor in tensors.values()]
    engine = open_engine(tensors, num_streams=num_streams, num_blocks=geometry.num_blocks)
    for tensor, before in zip(tensors.values(), untouched, strict=True):
        assert torch.equal(memory_of(tensor), before), "opening an engine changed the KV tensors"
    host = engine.pool.bytes.clone()
    last = engine.layout.num_blocks - 1
    assert engine.copy(STORE, ids(last, 0), ids(1, 4)).wait()
    naive_copy(loops, engine.layout.num_blocks, [(last, 1), (0, 4)], host, store=True)
    assert torch.equal(engine.pool.bytes, host)
    assert engine.copy(LOAD, ids(last), ids(2)).wait()
    naive_copy(loops, engine.layout.num_blocks, [(last, 2)], host, store=False)
    for ours, theirs in zip(tensors.values(), loops.values(), strict=True):
        assert torch.equal(memory_of(ours), memory_of(theirs))
    assert torch.equal(engine.pool.bytes, host)


@pytest.mark.parametrize("direction", [STORE, LOAD])
def test_no_blocks(direction: Direction, device: torch.device, open_engine: Open) -> None:
    engine = open_engine({"a": dense((4, 24), torch.int8, device)})
    before = contents(engine)
    ticket = engine.copy(direction, ids(), ids())
    engine.fence(ticket)
    assert ticket.wait()
    assert ticket.done
    assert all(torch.equal(a, b) for a, b in zip(before, contents(engine), strict=True))


def test_done_stays_done(device: torch.device, open_engine: Open) -> None:
    engine = open_engine({"a": dense((4, 24), torch.int8, device)})
    ticket = engine.copy(STORE, ids(1), ids(1))
    assert ticket.wait(timeout=60)
    assert ticket.done
    assert ticket.wait(0)


def test_ids_may_change_once_copy_returned(device: torch.device, open_engine: Open) -> None:
    """Also while the copy has not begun: the engine keeps its own."""
    kv = dense((4, 24), torch.int8, device)
    engine = open_engine({"a": kv})
    blocks, slots = ids(1, 2), ids(3, 4)
    if device.type == "cuda":
        torch.cuda._sleep(SLEEP_CYCLES)
    ticket = engine.copy(STORE, blocks, slots)
    later = engine.copy(STORE, ids(3), ids(5))
    blocks[:], slots[:] = 0, 0
    assert ticket.wait()
    assert later.wait()
    assert torch.equal(engine.pool.bytes[3:6, :24], kv[1:4].cpu().view(torch.uint8))


def test_cpu_copy_that_cannot_be_done_is_a_transfer_error() -> None:
    layout = make_layout({"a": torch.zeros(4, 16)})
    with HostPool(2, layout.slot_bytes, pinned=False) as pool:
        engine = CpuCopyEngine(layout, pool)
        for direction in (STORE, LOAD):
            with pytest.raises(TransferError, match=f"{direction.value} of 1 blocks failed"):
                engine.copy(direction, ids(99), ids(0))


def test_inference_tensors() -> None:
    """vLLM's KV tensors on the CPU are such; they may only be changed in inference mode."""
    with torch.inference_mode():
        kv = torch.arange(64, dtype=torch.uint8).view(4, 16).clone()
    layout = make_layout({"a": kv})
    with HostPool(2, layout.slot_bytes, pinned=False) as pool:
        engine = CpuCopyEngine(layout, pool)
        engine.copy(STORE, ids(1), ids(0))
        engine.copy(LOAD, ids(3), ids(0))
        assert torch.equal(kv[3], kv[1])


def test_random_traffic(device: torch.device, open_engine: Open) -> None:
    """Many copies under way at once, of disjoint blocks and slots in each round."""
    kv = {str(i): dense((64, 3, 40), torch.bfloat16, device, seed=i) for i in range(5)}
    loops = {name: dense((64, 3, 40), torch.bfloat16, device, seed=int(name)) for name in kv}
    engine = open_engine(kv, num_slots=64)
    host, draw = engine.pool.bytes.clone(), random.Random(3)
    for _ in range(6):
        blocks, slots = draw.sample(range(64), 64), draw.sample(range(64), 64)
        tickets = []
        for start in range(0, 64, 8):
            part = slice(start, start + 8)
            direction = STORE if draw.random() < 0.5 else LOAD
            tickets.append(engine.copy(direction, ids(*blocks[part]), ids(*slots[part])))
            moves = list(zip(blocks[part], slots[part], strict=True))
            naive_copy(loops, 64, moves, host, store=direction is STORE)
        assert all(ticket.wait(timeout=60) for ticket in tickets)
    assert torch.equal(engine.pool.bytes, host)
    assert all(torch.equal(memory_of(kv[name]), memory_of(loops[name])) for name in kv)


@pytest.mark.parametrize("direction", [STORE, LOAD])
@pytest.mark.parametrize("count", [4096, 9000, 32768, 32769, 150_000])
def test_more_blocks_than_one_launch_takes(
    count: int, direction: Direction, device: torch.device, open_engine: Open
) -> None:
    kv = dense((count, 24), torch.int8, device)
    engine = open_engine({"a": kv}, num_slots=count)
    blocks = np.random.default_rng(1).permutation(count)
    slots = np.random.default_rng(2).permutation(count)
    before, host = kv.cpu().view(torch.uint8), engine.pool.bytes.clone()
    assert engine.copy(direction, blocks, slots).wait()
    if direction is STORE:
        host[slots, :24] = before[blocks]
    else:
        before[blocks] = host[slots, :24]
    assert torch.equal(kv.cpu().view(torch.uint8), before)
    assert torch.equal(engine.pool.bytes[:, :24], host[:, :24])  # the rest is padding


only_cuda = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            torch.device("cuda"),
            marks=[
                pytest.mark.gpu,
                NO_CUDA,
            ],
        )
    ],
    indirect=False,
)


@only_cuda
@pytest.mark.parametrize("num_streams", [1, 2, 8])
def test_store_sees_what_was_computed_before_it(
    num_streams: int, device: torch.device, open_engine: Open
) -> None:
    kv = torch.zeros(64, 4096, dtype=torch.uint8, device=device)
    engine = open_engine({"a": kv}, num_slots=64, num_streams=num_streams)
    compute = torch.cuda.Stream()
    with torch.cuda.stream(compute):
        torch.cuda._sleep(SLEEP_CYCLES)
        kv.fill_(7)
        tickets = [engine.copy(STORE, ids(i), ids(i)) for i in range(64)]
    assert not any(ticket.done for ticket in tickets)
    assert not tickets[0].wait(timeout=0.001)
    assert all(ticket.wait() for ticket in tickets)
    assert engine.pool.bytes.eq(7).all()


@only_cuda
@pytest.mark.parametrize("num_streams", [1, 2, 8])
def test_fenced_reader_sees_the_load(
    num_streams: int, device: torch.device, open_engine: Open
) -> None:
    """The load is held up behind its caller's stream; the reader on it is not waited for."""
    kv = torch.zeros(64, 1 << 20, dtype=torch.uint8, device=device)
    engine = open_engine({"a": kv}, num_slots=64, num_streams=num_streams)
    compute, copy = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(copy):
        torch.cuda._sleep(SLEEP_CYCLES)
        kv.fill_(1)  # the load must come after this
        ticket = engine.copy(LOAD, np.arange(64), np.arange(64))
    with torch.cuda.stream(compute):
        engine.fence(ticket)
        read = kv.clone()
        assert not ticket.done, "the fence blocked the host"
    compute.synchronize()
    assert ticket.done
    assert torch.equal(read.cpu(), engine.pool.bytes)


@only_cuda
def test_ids_last_as_long_as_the_kernel_that_reads_them(
    device: torch.device, open_engine: Open
) -> None:
    """Nobody keeps the first ticket; its ids must not be overwritten by the second copy's."""
    kv = torch.arange(8, dtype=torch.uint8, device=device).repeat_interleave(4096).view(8, 4096)
    engine = open_engine({"a": kv}, num_slots=8)
    torch.cuda._sleep(SLEEP_CYCLES)
    engine.copy(STORE, ids(1, 2), ids(1, 2))
    assert engine.copy(STORE, ids(5, 6), ids(5, 6)).wait()
    torch.cuda.synchronize()
    assert engine.pool.bytes[[1, 2, 5, 6], 0].tolist() == [1, 2, 5, 6]


@only_cuda
def test_a_store_behind_a_fenced_load_reads_what_was_loaded(
    device: torch.device, open_engine: Open
) -> None:
    kv = torch.zeros(32, 1 << 20, dtype=torch.uint8, device=device)
    engine = open_engine({"a": kv}, num_slots=64, num_streams=8)
    for _ in range(8):
        torch.cuda._sleep(SLEEP_CYCLES // 10)
        kv.zero_()
        engine.fence(engine.copy(LOAD, np.arange(32), np.arange(32)))
        assert engine.copy(STORE, np.arange(32), np.arange(32, 64)).wait()
        assert torch.equal(engine.pool.bytes[:32], engine.pool.bytes[32:])
        engine.pool.bytes[32:] = 0


@only_cuda
@pytest.mark.parametrize("count", [0, 1, 40, 40_000])
def test_layers_come_one_after_the_other(
    count: int, device: torch.device, open_engine: Open
) -> None:
    kv = {name: dense((40_000, 3, 8), torch.int8, device) for name in "abc"}
    engine = open_engine(kv, num_slots=40_000)
    assert isinstance(engine, CudaCopyEngine)
    blocks = np.random.default_rng(1).permutation(40_000)[:count]
    slots = np.random.default_rng(2).permutation(40_000)[:count]
    expected = {name: tensor.cpu().clone() for name, tensor in kv.items()}
    for page in engine.layout.pages:
        part = engine.pool.bytes[slots, page.slot_offset : page.slot_offset + 24]
        expected[page.name][blocks] = part.view(torch.int8).view(-1, 3, 8)
    tickets = engine.load_layers(blocks, slots)
    for name, ticket in zip("abc", tickets, strict=True):
        engine.fence(ticket)
        assert torch.equal(kv[name].cpu(), expected[name])


@only_cuda
@pytest.mark.parametrize("mover", ["zero-copy", "staged", "dma"])
@pytest.mark.parametrize("page", [24, 4096, 40_000])
def test_every_mover_copies_the_same_bytes(mover: str, page: int, device: torch.device) -> None:
    """Enough blocks for many chunks of the staging buffers, to slots near and far."""
    with rig(device, page, page * 50_000) as machine:
        slots = np.random.default_rng(3).permutation(machine.num_blocks)
        half = machine.num_blocks // 2
        slots[:half] = np.sort(slots[:half])
        store, load = (machine.lane(way, mover, 8) for way in (STORE, LOAD))
        before = {name: kv.clone() for name, kv in machine.kv_caches.items()}
        machine.pool.bytes.fill_(0xEE)
        machine.slots = slots
        assert machine.start(store).wait()
        for page_ in machine.layout.pages:
            part = machine.pool.bytes[slots, page_.slot_offset : page_.slot_offset + page]
            assert torch.equal(part, before[page_.name][machine.block_ids].cpu())
        for kv in machine.kv_caches.values():
            kv.fill_(0xDD)
        assert machine.start(load).wait()
        assert all(torch.equal(kv, before[name]) for name, kv in machine.kv_caches.items())


@only_cuda
def test_both_ways_at_once(device: torch.device) -> None:
    with rig(device, 4096, 300 << 20) as machine:
        lanes = {way: machine.lane(way, "staged", 8, "off") for way in (STORE, LOAD)}
        half = machine.num_blocks // 2
        before = machine.kv_caches["layer.0"].clone()
        machine.pool.bytes[half:] = 0xEE
        for _ in range(3):
            machine.start_both(lanes)
        torch.cuda.synchronize()
        ids = torch.from_numpy(machine.block_ids).to(device)
        assert torch.equal(machine.pool.bytes[:half, :4096], before[ids[:half]].cpu())
        assert machine.kv_caches["layer.0"][ids[half:]].eq(0xEE).all()


@only_cuda
def test_close_lets_copies_end(device: torch.device, open_engine: Open) -> None:
    kv = torch.zeros(32, 4096, dtype=torch.uint8, device=device)
    engine = open_engine({"a": kv}, num_slots=32)
    torch.cuda._sleep(SLEEP_CYCLES)
    kv.fill_(7)
    ticket = engine.copy(STORE, np.arange(32), np.arange(32))
    engine.close()
    assert ticket.done
    assert engine.pool.bytes.eq(7).all()


@only_cuda
def test_a_launch_that_fails_is_a_transfer_error(
    device: torch.device, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = dense((9000, 24), torch.int8, device)
    engine = open_engine({"a": kv}, num_slots=9000)

    def broken(*_: object, **__: object) -> None:
        raise MemoryError("no room for the kernel")

    with monkeypatch.context() as patch:
        patch.setattr("kvortex.paged_kernel.PagedKernel.launch", broken)
        with pytest.raises(TransferError, match="store could not be launched: no room"):
            engine.copy(STORE, ids(1), ids(1))
        assert engine.copy(LOAD, ids(5000, 2), ids(3, 4)).wait()
    assert torch.equal(engine.pool.bytes[[3, 4], :24], kv[[5000, 2]].cpu().view(torch.uint8))
    assert engine.copy(STORE, ids(1), ids(1)).wait()
    assert torch.equal(engine.pool.bytes[1, :24], kv[1].cpu().view(torch.uint8))


@only_cuda
def test_nothing_is_made_for_each_copy(device: torch.device, open_engine: Open) -> None:
    engine = open_engine({"a": dense((4, 24), torch.int8, device)})
    assert isinstance(engine, CudaCopyEngine)
    for _ in range(500):
        assert engine.copy(STORE, ids(1), ids(1)).wait()
    assert len(engine._events._free) <= 12
    assert len(engine._lanes[STORE]._ids._lent) <= MANY + 1


@pytest.mark.parametrize("cycles", [500, pytest.param(100_000, marks=[pytest.mark.gpu, NO_CUDA])])
def test_cycles_leave_everything_where_it_was(
    cycles: int, device: torch.device, open_engine: Open
) -> None:
    """Memory, events, streams and files: a few hundred cycles show it, many prove it."""
    if (device.type == "cuda") != (cycles > 500):
        pytest.skip("the other device's number of cycles")
    engine = open_engine({"a": dense((64, 24), torch.int8, device)}, num_slots=64)
    few, many = np.arange(2), np.arange(64)

    def cycle(count: int) -> None:
        for i in range(count):
            which = many if i % 16 == 0 else few
            stored = engine.copy(STORE, which, which)
            engine.fence(engine.copy(LOAD, which, which))
            assert stored.wait()
        if device.type == "cuda":
            torch.cuda.synchronize()

    cycle(100)
    before = resources(device)
    cycle(cycles)
    after = resources(device)
    assert all(after[name] <= before[name] for name in before), (before, after)


def resources(device: torch.device) -> dict[str, int]:
    gc.collect()
    status = Path("/proc/self/status").read_text()
    (resident,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
    found = {
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
        "16 MiB of host memory": -(-int(resident) // (16 << 10)),
    }
    if device.type == "cuda":
        found["GPU memory"] = torch.cuda.mem_get_info()[0] * -1
        found["torch's GPU memory"] = torch.cuda.memory_allocated()
    return found


def test_cpu_copies_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_layout({"a": torch.zeros(4, 16)})
    monkeypatch.setattr("kvortex.copy_engine.LEAST_BYTES", 2 * layout.slot_bytes)
    with HostPool(4, layout.slot_bytes, pinned=False) as pool:
        engine = CpuCopyEngine(layout, pool)
        engine.copy(STORE, ids(0), ids(0))
        assert engine.bytes_per_s(STORE) is None
        engine.copy(STORE, ids(0, 1), ids(0, 1))
        assert engine.bytes_per_s(STORE)
        assert engine.bytes_per_s(LOAD) is None
        engine.copy(LOAD, ids(0, 1), ids(0, 1))
        assert engine.bytes_per_s(LOAD)
