"""A GPU of the mind: streams and events run in a random order that the real rules allow.

The engine, lanes and movers above are the real ones; driver calls are put into queues, and kernels
copy block by block, so that a missing event shows as wrong bytes for some seed.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import struct
from collections import deque
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kvortex.calibration import Calibration, Choice
from kvortex.core import Direction, TransferError
from kvortex.cuda_copy_engine import CudaCopyEngine
from kvortex.host_pool import HostPool
from kvortex.layout import make_layout
from kvortex.triton_kernels.reference import GOLDEN, _scrambled, _words
from kvortex.verification import verification_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import pytest

    from kvortex.id_ring import IdRing
    from kvortex.triton_kernels.paged_copy import Tiling
    from kvortex.verification import Verify

ROW = struct.Struct("qqq")
TICK = 1e-3


def moved(to: int, source: int, nbytes: int) -> bool:
    ctypes.memmove(to, source, nbytes)
    return True


class Moment:
    """One recording of an event, and the time at which it was reached."""

    def __init__(self, now: Callable[[], int]) -> None:
        self._now = now
        self.reached = False
        self.at = 0

    def reach(self) -> bool:
        self.reached, self.at = True, self._now()
        return True


class SimulatedDriver:
    """Stands in for CudaDriver. `fail_at` is the number of the call that fails, from now on.

    Time passes with what is copied: `TICK` seconds for each block of a kernel or piece of a copy.
    """

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.eagerness = self.draw.choice([0.0, 0.0, 0.3, 0.9])
        self.fail_at: int | None = None
        self.events: dict[int, Moment | None] = {}
        self.pieces = range(0)
        """Where pieces of the pool begin; no copy may reach from one into the next."""
        self.device = 0
        self.current_stream = 0
        self._streams: dict[int, deque[Callable[[], bool]]] = {}
        self._numbers = itertools.count(1000)
        self._timed: set[int] = set()
        self.ticks = 0

    def __enter__(self) -> None:
        """As torch.cuda.device: nothing to switch here."""

    def __exit__(self, *_: object) -> None: ...

    def create_event(self, *, timed: bool = False) -> int:
        self._count("create")
        event = next(self._numbers)
        if timed:
            self._timed.add(event)
        self.events[event] = None
        return event

    def destroy_event(self, event: int) -> None:
        del self.events[event]

    def record(self, event: int, stream: int) -> None:
        self._count("record")
        moment = self.events[event] = Moment(lambda: self.ticks)
        self._put(stream, moment.reach)

    def wait(self, stream: int, event: int) -> None:
        self._count("wait")
        moment = self.events[event]
        if moment is not None:
            self._put(stream, lambda: moment.reached)

    def reached(self, event: int) -> bool:
        moment = self.events[event]
        if moment is not None and not moment.reached:
            self._step()
        return moment is None or moment.reached

    def seconds_between(self, first: int, last: int) -> float:
        self._count("elapsed")
        assert {first, last} <= self._timed
        began, ended = self.events[first], self.events[last]
        assert began is not None
        assert ended is not None
        assert began.reached
        assert ended.reached
        return (ended.at - began.at) * TICK

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        self._count("copy")
        self._require_one_piece(to, source, nbytes)
        self._put(stream, partial(self._ticking, partial(moved, to, source, nbytes)))

    def copy_batch(
        self, to: np.ndarray, source: np.ndarray, sizes: np.ndarray, stream: int
    ) -> None:
        self._count("batch")
        for piece in zip(to.tolist(), source.tolist(), sizes.tolist(), strict=True):
            self._require_one_piece(*piece)
            self._put(stream, partial(self._ticking, partial(moved, *piece)))

    def launch(self, stream: int, blocks: Iterator[Callable[[], bool]]) -> None:
        self._count("launch")
        for block in blocks:
            self._put(stream, partial(self._ticking, block))

    def current_context(self) -> int:
        return 1

    def use_context(self, context: int) -> None: ...

    def synchronize(self, *_: object) -> None:
        while self._step():
            pass
        assert not any(self._streams.values()), "streams wait for each other"

    @property
    def idle(self) -> bool:
        return not any(self._streams.values())

    def _require_one_piece(self, to: int, source: int, nbytes: int) -> None:
        for address in (to, source):
            inside = range(address + 1, address + nbytes)
            assert not any(start in inside for start in self.pieces), "a copy spans two pieces"

    def _ticking(self, work: Callable[[], bool]) -> bool:
        self.ticks += 1
        return work()

    def _put(self, stream: int, work: Callable[[], bool]) -> None:
        self._streams.setdefault(stream, deque()).append(work)

    def _step(self) -> bool:
        """Let one stream that can do so go one step; false if none can."""
        for stream in self.draw.sample(list(self._streams), len(self._streams)):
            queue = self._streams[stream]
            if queue and queue[0]():
                queue.popleft()
                return True
        return False

    def _count(self, what: str) -> None:
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at == 0:
                raise TransferError(f"{what} failed on command")
        while self.draw.random() < self.eagerness and self._step():
            pass


class SimulatedKernel:
    """Stands in for PagedKernel; reads its ids when it runs, not when it is launched."""

    driver: SimulatedDriver

    def __init__(
        self,
        runs: torch.Tensor,
        slots: torch.Tensor,
        tiling: Tiling,
        direction: Direction,
        ids: IdRing,
        *,
        dense: bool = False,
        copy: bool = True,
    ) -> None:
        self._ways = ids.verdicts.ways if ids.verdicts is not None else {False}
        self._sums = ids.verdicts.sums if ids.verdicts is not None else None
        self._copies = copy
        self.device = runs.device
        self._word = tiling.word
        self._runs: list[list[int]] = runs.tolist()
        self._part_runs = tiling.part_runs
        self._slot_bytes = slots.shape[1]
        self._store = direction is Direction.STORE
        self._dense = dense

    def launch(
        self,
        ids: int,
        row: int,
        slots: int,
        count: int,
        programs: int,
        stream: int,
        *,
        summed: bool = False,
        runs: range | None = None,
    ) -> None:
        assert summed in self._ways
        runs = runs or range(len(self._runs))
        assert runs.start % self._part_runs == 0
        packed = self._slot_bytes if self._dense else 0
        blocks = (self._block(row + i, ids, slots + i * packed, runs, summed) for i in range(count))
        self.driver.launch(stream, blocks)

    def _block(
        self, row: int, ids: int, slots: int, runs: range, summed: bool
    ) -> Callable[[], bool]:
        def copy() -> bool:
            block, slot, seed = ROW.unpack(ctypes.string_at(ids + row * ROW.size, ROW.size))
            place = slots + (0 if self._dense else slot) * self._slot_bytes
            for number in runs:
                base, stride, offset, nbytes = self._runs[number]
                gpu, host = base + block * stride, place + offset
                if self._copies:
                    to, source = (host, gpu) if self._store else (gpu, host)
                    moved(to, source, nbytes)
                if summed and self._sums is not None:
                    part = number // self._part_runs if self._store else 0
                    self._sums.of_words[row, 1 + part] += self._sum(gpu, offset, nbytes)
            if summed:
                self._finish(row, block, slot, seed, runs)
            return True

        return copy

    def _sum(self, address: int, offset: int, nbytes: int) -> torch.Tensor:
        """Of one run."""
        part = torch.frombuffer(bytearray(ctypes.string_at(address, nbytes)), dtype=torch.uint8)
        places = torch.arange(offset // self._word, (offset + nbytes) // self._word)
        return _scrambled(_words(part[None], self._word) ^ places * GOLDEN).sum()

    def _finish(self, row: int, block: int, slot: int, seed: int, runs: range) -> None:
        assert self._sums is not None
        checksums = _scrambled(self._sums.of_words[row, 1:].cumsum(0) + seed)
        if self._store:
            self._sums.checksums[:, slot] = checksums
        elif self._sums.checksums[(runs.stop - 1) // self._part_runs, slot] != checksums:
            self._sums.verdicts[row] = 1
            for base, stride, _, nbytes in self._runs[runs.start : runs.stop]:
                ctypes.memset(base + block * stride, 0, nbytes)
        if self._store or runs.stop == len(self._runs):
            self._sums.of_words[row] = 0


class SimulatedStream:
    numbers = itertools.count(1)

    def __init__(self, *_: object, **__: object) -> None:
        self.cuda_stream = next(self.numbers)


def simulate(patch: pytest.MonkeyPatch, driver: SimulatedDriver, **constants: Any) -> None:
    """Put the simulation under the engine; constants are `module.NAME` with dots as `__`."""
    SimulatedKernel.driver = driver
    modules = (
        "cuda_ticket",
        "cuda_stopwatch",
        "lane",
        "cuda_copy_engine",
        "movers.staged",
        "movers.dma",
    )
    for module in modules:
        patch.setattr(f"kvortex.{module}.cuda_driver", lambda: driver)
    patch.setattr("kvortex.cuda_ticket.POLL_SECONDS", 0.0)  # each look is a step already
    patch.setattr("kvortex.movers.factory.PagedKernel", SimulatedKernel)
    patch.setattr(torch.cuda, "Stream", SimulatedStream)
    patch.setattr(torch.cuda, "synchronize", driver.synchronize)
    patch.setattr(torch.cuda, "device", lambda device: driver)
    patch.setattr(torch._C, "_cuda_getDevice", lambda: driver.device, raising=False)
    patch.setattr(
        torch._C,
        "_cuda_getCurrentRawStream",
        lambda index: driver.current_stream,
        raising=False,
    )
    for name, value in constants.items():
        patch.setattr(f"kvortex.{name.replace('__', '.')}", value)


def simulated_engine(
    patch: pytest.MonkeyPatch,
    choice: Choice,
    *,
    blocks: int,
    page: int,
    num_streams: int = 4,
    piece_slots: int = 1 << 20,
    verify: Verify = "always",
) -> tuple[dict[str, torch.Tensor], CudaCopyEngine]:
    """An engine over three layers of `blocks` blocks and as many slots, all full of noise.

    Each layer is a part of its own.
    """
    patch.setattr("kvortex.layout.LEAST_PART_BYTES", 1)
    kv = {
        name: torch.randint(0, 255, (blocks, page), dtype=torch.uint8) for name in ("a", "b", "c")
    }
    layout = make_layout(kv)
    pool = HostPool(blocks, layout.slot_bytes, pinned=False, num_parts=len(layout.parts()))
    pool.bytes.random_(0, 255)
    pool.piece_slots = piece_slots
    end = pool.address + pool.bytes.numel()
    SimulatedKernel.driver.pieces = range(pool.address, end, piece_slots * pool.slot_bytes)
    chosen = Calibration({4096: dict.fromkeys(Direction, choice)}, "simulated")
    patch.setattr("kvortex.cuda_copy_engine.load_calibration", lambda device: chosen)
    verification = replace(verification_of(layout, verify), by_gpu=True)
    return kv, CudaCopyEngine(layout, pool, num_streams, verification)
