"""The real engine, lanes and movers over a simulated GPU: exact in every order of events."""

from __future__ import annotations

import gc
import random
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from simulated_gpu import TICK, SimulatedDriver, simulate, simulated_engine

from kvortex.calibration import DMA, STAGED, ZERO_COPY, Choice
from kvortex.checksum import UNCOUNTED
from kvortex.core import Direction, TransferError
from kvortex.cuda_stopwatch import MOST_TIMED
from kvortex.verification import ONE_IN

if TYPE_CHECKING:
    from kvortex.cuda_copy_engine import CudaCopyEngine
    from kvortex.verification import Verify

STORE, LOAD = Direction.STORE, Direction.LOAD
PAGE = 24
SLOT = 3 * 32
BLOCKS = 120
CHOICES = [
    Choice(STAGED, STAGED, 0, 0, 4),
    Choice(ZERO_COPY, STAGED, 8 * SLOT, 3 * SLOT, 4),
    Choice(DMA, STAGED, 60 * SLOT, 30 * SLOT, 4),
    Choice(ZERO_COPY, ZERO_COPY, 0, 0, 4),
]


def same(kv: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(kv[name], expected[name]) for name in kv)


def same_slots(engine: CudaCopyEngine, expected: torch.Tensor) -> bool:
    """Bytes between the pages are nobody's."""
    return all(
        torch.equal(engine.pool.bytes[:, part], expected[:, part])
        for part in (slice(p.slot_offset, p.slot_offset + PAGE) for p in engine.layout.pages)
    )


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.small} {choice.large}")
@pytest.mark.parametrize("seed", range(12))
def test_exact_whatever_overtakes_what(
    choice: Choice, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    driver = SimulatedDriver(seed)
    simulate(
        monkeypatch,
        driver,
        cuda_copy_engine__ID_ROWS=draw.choice([64, 256, 4096]),
        movers__factory__BUFFER_BYTES=SLOT * draw.choice([2, 5, 16]),
        movers__staged__LEAST_CHUNK_BYTES=draw.choice([1, 2 * SLOT]),
        movers__dma__PART_BYTES=7 * SLOT,
        cuda_stopwatch__LEAST_BYTES=draw.choice([1, 20 * SLOT]),
    )
    kv, engine = simulated_engine(
        monkeypatch,
        choice,
        blocks=BLOCKS,
        page=PAGE,
        num_streams=draw.choice([1, 2, 8]),
        piece_slots=draw.choice([5, 16, BLOCKS]),
    )
    expected = {name: tensor.clone() for name, tensor in kv.items()}
    host = engine.pool.bytes.clone()
    for _ in range(3):
        ids = draw.sample(range(BLOCKS), BLOCKS)
        slots = draw.sample(range(BLOCKS), BLOCKS) if draw.random() < 0.5 else range(BLOCKS)
        tickets, start = [], 0
        while start < BLOCKS:
            end = start + draw.choice([0, 1, 3, 17, 60, 100])
            these, there = np.array(ids[start:end]), np.array(slots[start:end])
            these, there = these.astype(np.int64), there.astype(np.int64)
            direction = draw.choice([STORE, LOAD])
            tickets.append(engine.copy(direction, these, there))
            for page in engine.layout.pages:
                part = slice(page.slot_offset, page.slot_offset + PAGE)
                if direction is STORE:
                    host[there, part] = expected[page.name][these]
                else:
                    expected[page.name][these] = host[there, part]
            start = end
        assert all(ticket.wait() for ticket in tickets)
    driver.synchronize()
    assert same(kv, expected)
    assert same_slots(engine, host)
    engine.close()
    assert driver.events == {}


@pytest.mark.parametrize("mover", [ZERO_COPY, STAGED, DMA])
@pytest.mark.parametrize("direction", [STORE, LOAD])
def test_a_call_that_fails_leaves_nothing_under_way(
    mover: str, direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, failures = np.arange(40), 0
    for call in range(1, 30):
        with monkeypatch.context() as patch:
            driver = SimulatedDriver(call)
            simulate(
                patch,
                driver,
                cuda_copy_engine__ID_ROWS=32,
                cuda_copy_engine__PROBE_BYTES=1,
                movers__factory__BUFFER_BYTES=5 * SLOT,
                movers__staged__LEAST_CHUNK_BYTES=SLOT,
                cuda_stopwatch__LEAST_BYTES=1,
            )
            choice = Choice(mover, mover, 0, 0, 4)
            kv, engine = simulated_engine(patch, choice, blocks=60, page=PAGE)
            earlier = engine.copy(direction, np.arange(50, 60), np.arange(50, 60))
            driver.fail_at = call
            try:
                assert engine.copy(direction, many, many).wait()
            except TransferError:
                failures += 1
                assert driver.idle or call == 1
            driver.fail_at = None
            assert earlier.wait()
            slots = np.random.default_rng(call).permutation(60)
            assert engine.copy(STORE, np.arange(60), slots).wait()
            again = engine.copy(LOAD, np.arange(60), slots)
            assert again.wait()
            assert again.bad_block_ids == []  # no sum or verdict is left of what failed
            for page in engine.layout.pages:
                part = slice(page.slot_offset, page.slot_offset + PAGE)
                assert torch.equal(engine.pool.bytes[slots, part], kv[page.name])
            engine.close()
    assert failures >= (5 if direction is STORE else 0)


@pytest.mark.parametrize(
    ("verify", "seed"), [*(("always", seed) for seed in range(4)), ("sampled", 4), ("off", 5)]
)
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.small} {choice.large}")
def test_what_is_not_what_was_stored_is_found_and_nothing_else(
    verify: Verify, choice: Choice, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, driver = random.Random(seed), SimulatedDriver(seed)
    simulate(
        monkeypatch,
        driver,
        cuda_copy_engine__ID_ROWS=draw.choice([64, 4096]),
        cuda_copy_engine__LAUNCH_BYTES=draw.choice([1, BLOCKS * PAGE]),
        movers__factory__BUFFER_BYTES=SLOT * 5,
        movers__staged__LEAST_CHUNK_BYTES=SLOT,
        movers__dma__PART_BYTES=7 * SLOT,
    )
    _, engine = simulated_engine(
        monkeypatch, choice, blocks=BLOCKS, page=PAGE, piece_slots=16, verify=verify
    )
    blocks, slots = np.arange(BLOCKS), np.array(draw.sample(range(BLOCKS), BLOCKS))
    seeds = np.array([draw.randrange(-(1 << 63), 1 << 63) for _ in blocks])
    assert engine.copy(STORE, blocks, slots, seeds).wait()
    bad = set(draw.sample(range(BLOCKS), 6))
    flipped, of_another_key, one, other, stale, right = bad
    bad.remove(right)
    page = draw.choice(engine.layout.pages)
    at = page.slot_offset + draw.randrange(PAGE)
    engine.pool.bytes[slots[flipped], at] ^= 1 << draw.randrange(8)
    seeds[of_another_key] += 1
    slots[[one, other]] = slots[[other, one]]
    engine.pool.bytes[slots[stale]] = 0
    found, loads = set[int](), 0
    for _ in range(ONE_IN if verify == "sampled" else 1):
        start = 0
        while start < BLOCKS:
            part = slice(start, start + draw.choice([1, 17, 60, 100]))
            where = blocks[part], slots[part], seeds[part]
            whole = draw.random() < 0.5
            ticket = engine.copy(LOAD, *where) if whole else engine.load_layers(*where)[-1]
            assert ticket.wait()
            found.update(ticket.bad_block_ids)
            assert len(set(ticket.bad_block_ids)) == len(ticket.bad_block_ids)
            loads += 1
            start = part.stop
    if verify == "always":
        assert found == bad
    assert found <= (set() if verify == "off" else bad)
    engine.close()


@pytest.mark.parametrize("seed", range(8))
def test_layers_are_there_when_their_tickets_say_so(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = SimulatedDriver(seed)
    pages_a_launch = 1 + seed % 3
    simulate(monkeypatch, driver, cuda_copy_engine__LAUNCH_BYTES=pages_a_launch * BLOCKS * PAGE)
    kv, engine = simulated_engine(monkeypatch, CHOICES[1], blocks=BLOCKS, page=PAGE)
    slots = np.random.default_rng(seed).permutation(BLOCKS)
    assert engine.copy(STORE, np.arange(BLOCKS), slots).wait()
    expected = {name: tensor.clone() for name, tensor in kv.items()}
    spoilt = seed % 3  # as is the page of one block, so that it is cleared from this launch on
    engine.pool.bytes[slots[7], engine.layout.pages[spoilt].slot_offset] ^= 1
    for number, page in enumerate(engine.layout.pages):
        kv[page.name].random_(0, 255)
        if number >= spoilt // pages_a_launch * pages_a_launch:
            expected[page.name][7] = 0
    tickets = engine.load_layers(np.arange(BLOCKS), slots)
    assert len(set(tickets)) == -(-len(kv) // pages_a_launch)
    for page, ticket in zip(engine.layout.pages, tickets, strict=True):
        assert ticket.wait()
        assert torch.equal(kv[page.name], expected[page.name])
    assert tickets[-1].bad_block_ids == [7]
    engine.close()


def test_where_a_slot_is_wrong_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, SimulatedDriver(0))
    _, engine = simulated_engine(monkeypatch, CHOICES[0], blocks=BLOCKS, page=PAGE)
    ids, seeds = np.arange(BLOCKS), np.arange(BLOCKS) * 7
    assert engine.copy(STORE, ids, ids, seeds).wait()
    assert "the slot itself is right" in engine.wrong_layers(3, 21)
    engine.pool.bytes[3, engine.layout.pages[1].slot_offset] ^= 1
    assert engine.wrong_layers(3, 21) == "in layer b"
    assert engine.wrong_layers(4, 21) == "in layer a"  # of another key
    engine.pool.running_checksums[:-1, 3] = UNCOUNTED
    assert engine.wrong_layers(3, 21) == ""
    engine.close()


def test_blocks_of_which_only_the_whole_is_known_are_loaded_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulate(monkeypatch, SimulatedDriver(0), cuda_copy_engine__LAUNCH_BYTES=1)
    kv, engine = simulated_engine(monkeypatch, CHOICES[1], blocks=BLOCKS, page=PAGE)
    where = np.arange(BLOCKS), np.arange(BLOCKS)
    assert engine.copy(STORE, *where).wait()
    assert len(set(engine.load_layers(*where))) == len(kv)
    engine.pool.running_checksums[:-1, 5] = UNCOUNTED
    (ticket,) = set(engine.load_layers(*where))
    assert ticket.wait()
    assert ticket.bad_block_ids == []
    engine.pool.bytes[5, 0] ^= 1
    ticket = engine.load_layers(*where)[0]
    assert ticket.wait()
    assert ticket.bad_block_ids == [5]
    engine.close()


@pytest.mark.parametrize("by_layer", [False, True])
def test_who_waits_for_a_load_without_a_kernel_finds_what_is_wrong_cleared(
    by_layer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = SimulatedDriver(0)
    simulate(monkeypatch, driver)
    kv, engine = simulated_engine(monkeypatch, CHOICES[1], blocks=BLOCKS, page=PAGE)
    where = np.arange(BLOCKS), np.arange(BLOCKS)
    assert engine.copy(STORE, *where).wait()
    engine.pool.bytes[7, 0] ^= 1
    record, held = driver.record, list[bool]()

    def broken(*_: object, **__: object) -> None:
        raise MemoryError("no room for the kernel")

    def seen(event: int, stream: int) -> None:
        held.append(bool(kv["a"][7].any()))
        record(event, stream)

    monkeypatch.setattr("simulated_gpu.SimulatedKernel.launch", broken)
    monkeypatch.setattr(driver, "record", seen)
    ticket = engine.load_layers(*where)[0] if by_layer else engine.copy(LOAD, *where)
    assert held[-1] is False  # the ticket's event comes last
    assert ticket.wait()
    assert ticket.bad_block_ids == [7]
    assert torch.equal(kv["a"][8:], engine.pool.bytes[8:, :PAGE])
    engine.close()


def test_a_stream_that_is_fenced_waits_for_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimulatedDriver(0)
    driver.eagerness = 0.0
    simulate(monkeypatch, driver)
    kv, engine = simulated_engine(monkeypatch, CHOICES[0], blocks=BLOCKS, page=PAGE, verify="off")
    driver.current_stream = 77
    seen: list[bool] = []

    def read() -> bool:
        seen.append(torch.equal(kv["a"], engine.pool.bytes[:, :PAGE]))
        return True

    engine.fence(engine.copy(LOAD, np.arange(BLOCKS), np.arange(BLOCKS)))
    driver.launch(77, iter([read]))
    assert seen == []
    driver.synchronize()
    assert seen == [True]
    engine.close()


@pytest.mark.parametrize("mover", [ZERO_COPY, STAGED, DMA])
def test_events_are_used_again_though_nobody_asks_for_the_end(
    mover: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = SimulatedDriver(0)
    simulate(monkeypatch, driver, cuda_copy_engine__ID_ROWS=256)
    _, engine = simulated_engine(
        monkeypatch, Choice(mover, mover, 0, 0, 4), blocks=BLOCKS, page=PAGE
    )
    for i in range(300):
        engine.fence(engine.copy(STORE, np.arange(3), np.arange(3)))
        engine.fence(engine.load_layers(np.arange(3), np.arange(3))[-1])
        if i % 20 == 0:
            driver.synchronize()
    gc.collect()
    assert len(driver.events) < 300
    driver.synchronize()
    engine.close()
    assert driver.events == {}


def test_close_gives_buffers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, SimulatedDriver(0))
    _, engine = simulated_engine(monkeypatch, CHOICES[0], blocks=BLOCKS, page=PAGE)
    engine.close()
    assert engine._lanes == {}
    assert engine._streams == {}


def test_what_cannot_be_opened_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimulatedDriver(0)
    simulate(monkeypatch, driver)

    def broken(*_: object, **__: object) -> None:
        raise AttributeError("libcuda.so.1: undefined symbol")

    monkeypatch.setattr("kvortex.movers.factory.PagedKernel", broken)
    with pytest.raises(TransferError, match="cannot run KVortex's copies: libcuda"):
        simulated_engine(monkeypatch, CHOICES[0], blocks=4, page=PAGE)


LINK = SLOT / TICK
"""Bytes that a zero-copy kernel moves per second of the simulation, where nothing runs beside."""


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> tuple[SimulatedDriver, CudaCopyEngine]:
    """An engine that times copies of ten blocks and more, and weighs all measures alike."""
    driver = SimulatedDriver(0)
    driver.eagerness = 0.0
    simulate(
        monkeypatch,
        driver,
        cuda_copy_engine__LAUNCH_BYTES=1,
        cuda_stopwatch__LEAST_BYTES=10 * SLOT,
        speedometer__KEPT=1.0,
    )
    return driver, simulated_engine(monkeypatch, CHOICES[3], blocks=BLOCKS, page=PAGE)[1]


def speeds(engine: CudaCopyEngine) -> list[float | None]:
    return [engine.bytes_per_s(direction) for direction in (STORE, LOAD)]


def test_a_copy_is_timed_from_its_turn_to_its_end(
    timed: tuple[SimulatedDriver, CudaCopyEngine],
) -> None:
    driver, engine = timed
    assert speeds(engine) == pytest.approx([LINK, LINK])  # a probe both ways
    for copy in (partial(engine.copy, STORE), partial(engine.copy, LOAD), engine.load_layers):
        driver.launch(driver.current_stream, iter([lambda: True] * 500))  # it has to wait for this
        copy(np.arange(40), np.arange(40))
        speeds(engine)  # nothing is there to be read yet
        driver.synchronize()
    assert speeds(engine)[0] == pytest.approx(LINK)
    pages = len(engine.layout.pages)  # each of which was one launch, and 40 ticks
    assert speeds(engine)[1] == pytest.approx(LINK * (BLOCKS + 80) / (BLOCKS + 40 + 40 * pages))
    engine.close()
    assert speeds(engine)[0] == pytest.approx(LINK)
    assert driver.events == {}


def test_what_runs_beside_a_load_slows_it(timed: tuple[SimulatedDriver, CudaCopyEngine]) -> None:
    driver, engine = timed
    before = speeds(engine)[1]
    engine.copy(LOAD, np.arange(60), np.arange(60))
    engine.copy(STORE, np.arange(60, 120), np.arange(60, 120))
    driver.synchronize()
    now = speeds(engine)[1]
    assert now is not None
    assert before is not None
    assert 0.6 * before < now < 0.9 * before
    engine.close()


@pytest.mark.parametrize("steps", [30, 60, 90, 120])
def test_loads_that_overlap_share_their_seconds(
    steps: int, timed: tuple[SimulatedDriver, CudaCopyEngine]
) -> None:
    driver, engine = timed
    for start in range(0, 120, 40):
        engine.copy(LOAD, np.arange(start, start + 40), np.arange(start, start + 40))
        for _ in range(steps):
            driver._step()
    driver.synchronize()
    assert speeds(engine)[1] == pytest.approx(LINK)
    engine.close()


def test_small_copies_and_too_many_are_not_timed(
    timed: tuple[SimulatedDriver, CudaCopyEngine],
) -> None:
    driver, engine = timed
    speeds(engine)
    stopwatch = engine._stopwatches[LOAD]
    for _ in range(3):
        engine.copy(LOAD, np.arange(9), np.arange(9))
    assert not stopwatch._under_way
    driver.synchronize()
    for _ in range(2 * MOST_TIMED):
        engine.copy(LOAD, np.arange(10), np.arange(10))
    assert len(stopwatch._under_way) == MOST_TIMED
    driver.synchronize()
    assert speeds(engine)[1] == pytest.approx(LINK, rel=0.1)
    assert len(stopwatch._free) == MOST_TIMED
    engine.close()
    assert driver.events == {}


def test_a_gpu_that_fails_is_not_asked_for_times(
    timed: tuple[SimulatedDriver, CudaCopyEngine],
) -> None:
    driver, engine = timed
    before = speeds(engine)
    engine.copy(LOAD, np.arange(60), np.arange(60))
    driver.synchronize()
    driver.fail_at = 1
    assert speeds(engine) == before
    engine.close()
