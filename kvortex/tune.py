"""Measures the movers on this machine, page size by page size, and draws the choices from it."""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvortex.calibration import DMA, STAGED, ZERO_COPY, Calibration, Choice
from kvortex.cargo import Cargo
from kvortex.core import Direction
from kvortex.cuda_driver import cuda_driver
from kvortex.cuda_ticket import CudaTicket, EventPool
from kvortex.host_pool import HostPool
from kvortex.id_ring import open_ring
from kvortex.lane import Lane
from kvortex.layout import make_layout
from kvortex.movers import open_movers
from kvortex.verification import verification_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvortex.core import BlockIds
    from kvortex.layout import Layout
    from kvortex.verification import Verify

PAGES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 2 << 20)
PROGRAMS = (4, 8, 16, 32, 64)
MOVERS = (ZERO_COPY, STAGED, DMA)
ENOUGH = 0.99
"""A grid is large enough if a larger one is not faster by more than this."""
LAYERS = 32
TOTAL_BYTES = 256 << 20
ROUNDS = 5
CLEARLY = 0.85
LEAST_BORDER, LARGEST_BORDER = 1 << 20, 1 << 30
LARGEST_ZERO_COPY_STORE = 4 << 20
"""A matrix product that finds a few SMs taken waits for them: beside zero-copy stores without pause
it took 1.4 to 1.6 times as long on an H100, beside staged ones 1.01 (bench/bench_transfer.py)."""


class Rig:
    """Scattered blocks of one page size on a GPU and a pool that holds as many; two streams.

    Args:
        device: a CUDA device.
        page_bytes: of each layer.
        total_bytes: of all blocks together.
        layers: by default 32, less if there would be but a few blocks.
    """

    def __init__(
        self,
        device: torch.device,
        page_bytes: int,
        total_bytes: int = TOTAL_BYTES,
        layers: int | None = None,
    ) -> None:
        self.layers = layers or (LAYERS if page_bytes * LAYERS * 8 <= total_bytes else 8)
        self.num_blocks = max(2, total_bytes // (page_bytes * self.layers))
        self.kv_caches = {
            f"layer.{i}": torch.randint(
                0, 255, (self.num_blocks, page_bytes), dtype=torch.uint8, device=device
            )
            for i in range(self.layers)
        }
        self.layout: Layout = make_layout(self.kv_caches)
        parts = len(self.layout.parts())
        self.pool = HostPool(self.num_blocks, self.layout.slot_bytes, pinned=True, num_parts=parts)
        self.pool.wait_until_ready()
        self.nbytes = self.num_blocks * self.layout.slot_bytes
        self.block_ids: BlockIds = np.random.default_rng(0).permutation(self.num_blocks)
        self.slots: BlockIds = np.arange(self.num_blocks)
        self.events = EventPool()
        self._device = device
        self._entered = self.events.take()
        self._streams = {way: torch.cuda.Stream(device) for way in Direction}

    def lane(
        self, direction: Direction, mover: str, programs: int, verify: Verify = "always"
    ) -> Lane:
        """With a single mover and its own ids; `verify` as in KVortexConfig."""
        rows, verification = 4 * self.num_blocks, verification_of(self.layout, verify)
        ids = open_ring(rows, self.pool, self._device, direction, verification)
        movers = open_movers(self.layout, self.pool, direction, {mover}, programs, ids, self.events)
        stream = self._streams[direction].cuda_stream
        return Lane(direction, [stream], movers, ids, self.events, self.num_blocks)

    def start(self, lane: Lane, count: int | None = None, first: int = 0) -> CudaTicket:
        """Copy `count` blocks, by default all, from the `first` on."""
        part = slice(first, None if count is None else first + count)
        (mover,) = lane.movers
        cuda_driver().record(self._entered, torch.cuda.current_stream(self._device).cuda_stream)
        ids = self.block_ids[part]
        cargo = Cargo(ids, self.slots[part], seeds=ids)  # any seeds will do
        return lane.submit(mover, cargo, self._entered)

    def start_both(self, lanes: Mapping[Direction, Lane]) -> None:
        """Store one half of the blocks while the other is loaded."""
        half = self.num_blocks // 2
        self.start(lanes[Direction.STORE], half)
        self.start(lanes[Direction.LOAD], None, half)

    def seconds(self, work: Callable[[], object], rounds: int = ROUNDS) -> float:
        """Median time of something that starts copies, until the GPU is done with them."""
        return median_seconds(work, rounds, self._device)

    def close(self) -> None:
        """Give everything back."""
        torch.cuda.synchronize(self._device)
        self.events.close()
        self.pool.close()


def median_seconds(
    work: Callable[[], object], rounds: int = ROUNDS, device: torch.device | None = None
) -> float:
    """Median time until the GPU, by default the current one, is done with what `work` starts.

    One round before is not counted.
    """
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


@contextmanager
def rig(
    device: torch.device,
    page_bytes: int,
    total_bytes: int = TOTAL_BYTES,
    layers: int | None = None,
) -> Iterator[Rig]:
    """A Rig for the length of a `with` block."""
    opened = Rig(device, page_bytes, total_bytes, layers)
    try:
        yield opened
    finally:
        opened.close()


@dataclass(frozen=True, slots=True)
class Measured:
    """One mover, one direction, one page size."""

    page_bytes: int
    direction: Direction
    mover: str
    programs: int
    block_seconds: float
    """For a single block, from submission to the end."""
    gb_s: float
    busy_gb_s: float
    """While the same mover works in the other direction, too."""

    def seconds(self, nbytes: int, block_bytes: int, *, busy: bool) -> float:
        """Expected for a copy of so many bytes."""
        speed = (self.busy_gb_s if busy else self.gb_s) * 1e9
        return self.block_seconds + max(0, nbytes - block_bytes) / speed


def tune(
    device: torch.device, say: Callable[[str], None], pages: tuple[int, ...] = PAGES
) -> tuple[Calibration, list[Measured]]:
    """Measure every mover at every page size; takes a few seconds.

    Args:
        device: a CUDA device with half a GiB free.
        say: called with each line of progress.
        pages: page sizes in bytes.

    Raises:
        TransferError: this GPU cannot run a mover.
        PoolAllocationError: there is no host memory to measure with.
    """
    choices, rows = {}, []
    for page in pages:
        say(f"pages of {page >> 10} KiB")
        with rig(device, page) as machine:
            measured = _measure(machine, page)
            rows += measured
            choices[page] = {
                way: _choose([row for row in measured if row.direction is way], machine)
                for way in Direction
            }
    return Calibration(choices, "measured now"), rows


def _measure(machine: Rig, page: int) -> list[Measured]:
    rows = []
    for mover in MOVERS:
        grids = {way: _smallest_grid(machine, way, mover) for way in Direction}
        lanes = {way: machine.lane(way, mover, grids[way]) for way in Direction}
        if any(mover not in lane.movers for lane in lanes.values()):
            continue
        both = machine.seconds(partial(machine.start_both, lanes))
        for way, lane in lanes.items():
            whole = machine.seconds(partial(machine.start, lane))
            block = machine.seconds(partial(machine.start, lane, 1), 3 * ROUNDS)
            speed, busy = machine.nbytes / whole / 1e9, machine.nbytes / both / 2e9
            rows.append(Measured(page, way, mover, grids[way], block, speed, busy))
    return rows


def _smallest_grid(machine: Rig, direction: Direction, mover: str) -> int:
    """The fewest programs that are as fast as any number of them; 1 where it does not matter."""
    if mover != ZERO_COPY:
        return 1
    times = {}
    for programs in PROGRAMS:
        lane = machine.lane(direction, mover, programs)
        times[programs] = machine.seconds(partial(machine.start, lane), 3)
    best = min(times.values())
    return next(programs for programs in PROGRAMS if times[programs] * ENOUGH <= best)


def _choose(rows: list[Measured], machine: Rig) -> Choice:
    """Zero-copy for one block unless another is clearly quicker, the fastest for many blocks."""
    block = machine.layout.slot_bytes
    zero_copy = next(row for row in rows if row.mover == ZERO_COPY)
    quickest = min(rows, key=lambda row: row.block_seconds)
    small = quickest if quickest.block_seconds < CLEARLY * zero_copy.block_seconds else zero_copy
    large = max(rows, key=lambda row: statistics.harmonic_mean([row.gb_s, row.busy_gb_s]))
    store = zero_copy.direction is Direction.STORE
    most = LARGEST_ZERO_COPY_STORE if store else LARGEST_BORDER
    return Choice(
        small=small.mover,
        large=large.mover,
        from_bytes=min(most, _border(small, large, block, busy=False)),
        busy_from_bytes=min(most, _border(small, large, block, busy=True)),
        programs=zero_copy.programs,
    )


def _border(small: Measured, large: Measured, block_bytes: int, *, busy: bool) -> int:
    """The least power of two of bytes that `large` moves sooner."""
    size = LEAST_BORDER
    while size < LARGEST_BORDER and large.seconds(size, block_bytes, busy=busy) >= small.seconds(
        size, block_bytes, busy=busy
    ):
        size *= 2
    return size


def speeds(rows: list[Measured]) -> dict[Direction, float]:
    """GB/s each way by the fastest mover, for the page size in the middle."""
    found = {}
    for way in Direction:
        best: dict[int, float] = {}
        for row in rows:
            if row.direction is way:
                best[row.page_bytes] = max(row.gb_s, best.get(row.page_bytes, 0.0))
        found[way] = statistics.median(best.values())
    return found


def table(rows: list[Measured], calibration: Calibration) -> str:
    """For a person's eyes."""
    lines = [
        f"{'page':>9} {'':5} {'mover':10} {'GB/s':>6} {'both ways':>9} {'one block':>9} {'grid':>4}"
    ]
    for row in rows:
        choice = calibration.choices[row.page_bytes][row.direction]
        used = ", ".join(
            text
            for mover, text in (
                (choice.small, "small copies"),
                (choice.large, f"from {choice.from_bytes >> 20} MiB"),
            )
            if mover == row.mover
        )
        lines.append(
            f"{row.page_bytes >> 10:>5} KiB {row.direction.value:5} {row.mover:10} {row.gb_s:6.1f} "
            f"{row.busy_gb_s:9.1f} {row.block_seconds * 1e6:6.0f} us {row.programs:>4}  {used}"
        )
    return "\n".join(lines)
