"""CudaCopyEngine: gives each copy to the mover that is fastest for it. Worker side."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from bisect import bisect_left
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvortex.calibration import ZERO_COPY, load_calibration
from kvortex.checksum import UNCOUNTED
from kvortex.copy_engine import CopyEngine, Ticket
from kvortex.core import Direction, TransferError
from kvortex.cuda_driver import cuda_driver
from kvortex.cuda_stopwatch import CudaStopwatch
from kvortex.cuda_ticket import CudaTicket, EventPool
from kvortex.id_ring import open_ring
from kvortex.judgement import Judgement
from kvortex.lane import Lane
from kvortex.movers import open_movers
from kvortex.paged_kernel import tiling_of
from kvortex.triton_kernels.reference import checksums_reference, paged_copy_reference
from kvortex.verification import seeds_from

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvortex.cargo import Cargo
    from kvortex.core import BlockIds
    from kvortex.cuda_driver import Handle
    from kvortex.host_pool import HostPool
    from kvortex.layout import Layout
    from kvortex.verification import Verification

logger = logging.getLogger(__name__)

ID_ROWS = 65536
LAUNCH_BYTES = 4 << 20
"""At least, of parts that are loaded one by one: a launch costs the host about 10 us, in which an
H200's link carries half a MiB."""
PROBE_BYTES = 64 << 20
MOST_CHUNKS = (1 << 31) - (1 << 24)
"""The kernel counts the chunks of a launch in 32 bits."""


class CudaCopyEngine(CopyEngine):
    """Loads run on streams of high priority, stores on streams of low priority.

    The calling thread submits every copy: that takes microseconds, where a thread of its own would
    wait for the GIL, on a busy model thread for milliseconds at a time.

    Args:
        layout: of KV tensors on the GPU.
        pool: pinned.
        num_streams: of CUDA.
        verification: see CopyEngine.
        warm_up: try every mover and measure the link; what the first slots hold is lost.

    Raises:
        TransferError: this GPU cannot run the movers.
    """

    def __init__(
        self,
        layout: Layout,
        pool: HostPool,
        num_streams: int,
        verification: Verification | None = None,
        *,
        warm_up: bool = True,
    ) -> None:
        super().__init__(layout, pool, verification)
        if torch.version.hip is not None:
            raise TransferError("KVortex needs an NVIDIA GPU; this torch was built for ROCm")
        self._device = layout.device
        self._index = int(layout.device.index or 0)
        try:
            with torch.cuda.device(self._device):
                self._open(num_streams)
                if warm_up:
                    self._warm_up()
        except Exception as error:  # Triton and ctypes raise errors of many unrelated classes
            raise TransferError(f"this GPU cannot run KVortex's copies: {error}") from error

    def _open(self, num_streams: int) -> None:
        self._parts = self.layout.parts()
        self._stretches: list[tuple[int, int]] = self.layout.run_table()[:, 2:].tolist()
        self._page_ends = [runs.stop for runs in self.layout.page_runs()]
        self._driver = cuda_driver()
        self._context = self._driver.current_context()
        self._thread = threading.get_ident()
        self._events = EventPool()
        self._entered = self._events.take()
        calibration = load_calibration(self._device)
        self._choices = calibration.for_page(self.layout.stretch_bytes())
        self._streams = _open_streams(self._device, num_streams)
        self._stopwatches = {
            way: CudaStopwatch(self._speedometers[way], self.pool.slot_bytes) for way in Direction
        }
        self._lanes = {way: self._lane(way) for way in Direction}
        self._last: dict[Direction, CudaTicket | None] = dict.fromkeys(Direction)
        logger.info("KVortex copies by %s", self._describe(calibration.origin))

    def _copy(self, direction: Direction, cargo: Cargo) -> Ticket:
        if self._is_elsewhere():
            with self._at_home():
                return self._copy(direction, cargo)
        try:
            ticket = self._submit(direction, cargo)
        except Exception as error:
            if direction is Direction.STORE:
                raise TransferError(f"store could not be launched: {error}") from error
            ticket = self._load_plainly(cargo, error)
        self._last[direction] = ticket
        return ticket

    def _load_layers(self, cargo: Cargo) -> Sequence[Ticket]:
        """A launch carries as many parts as make LAUNCH_BYTES; its pages share its ticket.

        Blocks whose parts cannot be compared, and more than one launch takes, are loaded whole:
        every page then has the same ticket.
        """
        if not self._knows_parts(cargo.slots):
            return [self._copy(Direction.LOAD, cargo)] * len(self.layout.pages)
        with self._at_home():
            try:
                lane, launches = self._lanes[Direction.LOAD], self._launches(len(cargo))
                tickets = lane.submit_runs(cargo, self._before(), launches)
                ends = [runs.stop for runs in launches]
                tickets = [tickets[bisect_left(ends, end)] for end in self._page_ends]
            except Exception as error:  # noqa: BLE001  (a load was promised, whatever it was)
                tickets = [self._load_plainly(cargo, error)] * len(self.layout.pages)
        self._last[Direction.LOAD] = tickets[-1]
        return tickets

    def _knows_parts(self, slots: BlockIds) -> bool:
        """Whether nobody computes from a part before it is known to be right."""
        if self.verification is None or not self.verification.on:
            return True
        first = self.pool.running_checksums[0].numpy()
        return not (first[slots] == UNCOUNTED).any()

    def _launches(self, num_blocks: int) -> list[range]:
        """Rows of the run table that are loaded together; whole parts."""
        of_a_part = num_blocks * self.pool.slot_bytes // len(self._parts)
        together = -(-LAUNCH_BYTES // max(1, of_a_part))
        several = (self._parts[i : i + together] for i in range(0, len(self._parts), together))
        return [range(parts[0].start, parts[-1].stop) for parts in several]

    def wrong_layers(self, slot: int, seed: int) -> str:
        (start,) = seeds_from(np.array([seed]), 1, self.verification).tolist()
        kept = self.pool.running_checksums[:, slot].tolist()
        if UNCOUNTED in kept:
            return ""
        for part, checksum in zip(self._parts, kept, strict=True):
            if checksum != self._checksum(slot, part.stop, start):
                return self._layers_of(part)
        return "which they became on their way, as the slot itself is right"

    def _layers_of(self, part: range) -> str:
        """Those that have runs in a part."""
        runs = self.layout.page_runs()
        of_part = [
            page.name
            for page, own in zip(self.layout.pages, runs, strict=True)
            if own.start < part.stop and own.stop > part.start
        ]
        first, last = of_part[0], of_part[-1]
        return f"in layer {first}" if first == last else f"in the layers {first} to {last}"

    def _checksum(self, slot: int, end: int, start: int) -> int:
        """Of the first `end` runs of a slot, counted slowly by the CPU."""
        assert self.verification is not None
        block, seeds = self.pool.bytes[slot : slot + 1], torch.tensor([start])
        stretches, word = self._stretches[:end], self.verification.word
        return int(checksums_reference(block, stretches, word, seeds))

    def bytes_per_s(self, direction: Direction) -> float | None:
        if direction in self._stopwatches:
            self._stopwatches[direction].read()
        return super().bytes_per_s(direction)

    def fence(self, ticket: Ticket) -> None:
        assert isinstance(ticket, CudaTicket)
        if self._is_elsewhere():
            with self._at_home():
                ticket.hold(self._current_stream())
        else:
            ticket.hold(self._current_stream())

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # a GPU that failed; its tickets say so
            torch.cuda.synchronize(self._device)
            self._events.close()
            for stopwatch in self._stopwatches.values():
                stopwatch.close()
        self._stopwatches.clear()
        self._lanes.clear()
        self._streams.clear()
        self._last.clear()

    def _submit(self, direction: Direction, cargo: Cargo) -> CudaTicket:
        lane = self._lanes[direction]
        mover = self._mover(direction, len(cargo) * self.pool.slot_bytes)
        if mover not in lane.movers:
            mover = ZERO_COPY
        return lane.submit(mover, cargo, self._before())

    def _mover(self, direction: Direction, nbytes: int) -> str:
        """The name of the fastest; only where it matters is the other direction looked at."""
        choice = self._choices[direction]
        if nbytes < choice.busy_from_bytes and nbytes < choice.from_bytes:
            return choice.small
        other = self._last[Direction.LOAD if direction is Direction.STORE else Direction.STORE]
        return choice.mover(nbytes, busy=other is not None and not _is_over(other))

    def _load_plainly(self, cargo: Cargo, reason: Exception) -> CudaTicket:
        """Load without a mover, while the host waits: vLLM was promised these bytes.

        vLLM's second model runner never goes back to a failed block, whatever the scheduler says.
        To tell it (`Worker.take_bad_blocks`) is therefore the last resort.

        Raises:
            TransferError: torch cannot do it either.
        """
        logger.warning("A load could not be launched (%s); copying it slowly.", reason)
        pages = [(page.view, page.slot_offset) for page in self.layout.pages]
        ids, places = torch.from_numpy(cargo.block_ids), torch.from_numpy(cargo.slots)
        try:
            paged_copy_reference(pages, ids, places, self.pool.bytes, store=False)
            wrong = self._wrong(cargo)
            self._clear(wrong)  # before the ticket: whom that lets through finds zeros
            return CudaTicket(self._events, self._current_stream(), Judgement(lambda: wrong))
        except RuntimeError as error:
            raise TransferError(f"load of {len(cargo)} blocks failed: {error}") from error

    def _wrong(self, cargo: Cargo) -> list[int]:
        """Blocks whose slot does not hold what was stored, found slowly by the CPU."""
        if self.verification is None or not self.verification.on:
            return []
        columns = (cargo.block_ids, cargo.slots, cargo.seeds)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        end = self._parts[-1].stop
        return [
            block_id
            for block_id, slot, seed in rows
            if self._checksum(slot, end, seed) != self.pool.checksums[slot].item()
        ]

    def _before(self) -> Handle:
        """The event behind the current stream's work; for the next submission only."""
        self._driver.record(self._entered, self._current_stream())
        return self._entered

    def _current_stream(self) -> Handle:
        """torch's public way to it takes twenty times as long."""
        handle: Handle = torch._C._cuda_getCurrentRawStream(self._index)
        return handle

    def _is_elsewhere(self) -> bool:
        """Whether the caller's device or thread is not the one that the driver last worked in."""
        return torch._C._cuda_getDevice() != self._index or threading.get_ident() != self._thread

    @contextlib.contextmanager
    def _at_home(self) -> Iterator[None]:
        """On the KV tensors' device. A thread that is new to the driver is given its context."""
        with torch.cuda.device(self._device):
            if threading.get_ident() != self._thread:
                self._driver.use_context(self._context)
                self._thread = threading.get_ident()
            yield

    def _lane(self, direction: Direction) -> Lane:
        choice = self._choices[direction]
        ids = open_ring(ID_ROWS, self.pool, self._device, direction, self.verification)
        names = {ZERO_COPY, choice.small, choice.large}
        movers = open_movers(
            self.layout, self.pool, direction, names, choice.programs, ids, self._events
        )
        streams = [stream.cuda_stream for stream in self._streams[direction]]
        runs = self.layout.run_table()
        block_chunks = len(runs) * tiling_of(runs, self.pool.slot_bytes).chunks_per_run
        most = max(1, min(ID_ROWS // 2, MOST_CHUNKS // block_chunks))
        stopwatch = self._stopwatches[direction]
        return Lane(direction, streams, movers, ids, self._events, most, stopwatch)

    def _warm_up(self) -> None:
        """Find out now if this GPU cannot run a mover.

        The first blocks go to the first slots and back, and so stay as they are.

        Raises:
            TransferError: it cannot.
        """
        first = np.zeros(1, np.int64)
        cargo = self._cargo(first, first)
        for direction in (Direction.STORE, Direction.LOAD):
            lane = self._lanes[direction]
            for mover in lane.movers:
                lane.submit(mover, cargo, self._before()).wait()
        self._probe()

    def _probe(self) -> None:
        """Copy up to PROBE_BYTES both ways, so that the link is known from the first load on."""
        most = max(1, PROBE_BYTES // self.pool.slot_bytes)
        some = np.arange(min(most, self.pool.num_ready_slots, self.layout.num_blocks))
        cargo = self._cargo(some, some)
        for direction in (Direction.STORE, Direction.LOAD):  # so that blocks stay as they are
            began = time.perf_counter()
            self._submit(direction, cargo).wait()
            seconds = time.perf_counter() - began
            if self.bytes_per_s(direction) is None:  # too few for the stopwatch
                self._speedometers[direction].note(len(cargo) * self.pool.slot_bytes, seconds)

    def _describe(self, origin: str) -> str:
        told = [
            f"{way.value}: {choice.small}, {choice.large} from {choice.from_bytes >> 20} MiB"
            for way, choice in self._choices.items()
        ]
        return f"{'; '.join(told)} ({origin})"


def _is_over(ticket: CudaTicket) -> bool:
    """Whether a copy ended, well or not."""
    try:
        return ticket.done
    except TransferError:
        return True


def _open_streams(device: torch.device, number: int) -> dict[Direction, list[torch.cuda.Stream]]:
    """Half of the streams for each direction, taken in turn, and one for each at least."""
    loads = [torch.cuda.Stream(device, priority=-1) for _ in range(max(1, number // 2))]
    stores = [torch.cuda.Stream(device, priority=0) for _ in range(number - number // 2)]
    return {Direction.LOAD: loads, Direction.STORE: stores}
