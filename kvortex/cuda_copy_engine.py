"""CudaCopyEngine: moves blocks with the Triton kernel, zero-copy, on its own CUDA streams."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvortex.copy_engine import CopyEngine, Ticket
from kvortex.core import Direction, TransferError
from kvortex.triton_kernels.paged_copy import paged_copy
from kvortex.triton_kernels.reference import paged_copy_reference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvortex.core import BlockIds
    from kvortex.host_pool import HostPool
    from kvortex.layout import Layout

logger = logging.getLogger(__name__)

BLOCKS_PER_LAUNCH = 4096
LARGEST_CHUNK_WORDS = 4096
LARGE_RUN_BYTES = 16 << 10
POLL_SECONDS = 50e-6


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """How one layout is cut up for the kernel.

    Measured on an H200 over PCIe 5: 8 programs of 4 096 8-byte words fill the link from runs of
    16 KiB on; shorter runs need more programs to hide the latency of the link.
    """

    word: int
    chunk_words: int
    chunks_per_run: int
    programs: int
    num_warps: int

    @classmethod
    def of(cls, runs: torch.Tensor, slot_bytes: int) -> LaunchShape:
        """Choose for a run table (see `Layout.run_table`)."""
        word = _common_word(runs, slot_bytes)
        longest = int(runs[:, 3].max())
        chunk_words = min(LARGEST_CHUNK_WORDS, 1 << (longest // word - 1).bit_length())
        return cls(
            word=word,
            chunk_words=chunk_words,
            chunks_per_run=-(-longest // (chunk_words * word)),
            programs=8 if longest >= LARGE_RUN_BYTES else 32,
            num_warps=min(16, max(1, chunk_words // 64)),
        )


def _common_word(runs: torch.Tensor, slot_bytes: int) -> int:
    """The largest of 8, 4, 2, 1 that divides every number in the table and the slot size."""
    bits = slot_bytes | 8
    for number in runs.flatten().tolist():
        bits |= number
    return bits & -bits


class CudaTicket(Ticket):
    """An event behind the last launch of a copy."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    @property
    def done(self) -> bool:
        try:
            return bool(self.event.query())
        except RuntimeError as error:
            raise TransferError(f"the GPU reported: {error}") from error

    def wait(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True


class _IdPages:
    """Pinned memory in which kernels read their ids themselves, so that nothing is copied.

    A page is written again only after the kernels that read it ended; torch's own allocator
    does not know of them.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._lent: list[tuple[list[torch.Tensor], torch.cuda.Event]] = []

    def write(self, block_ids: BlockIds, slots: BlockIds) -> torch.Tensor:
        """An int64 page (BLOCKS_PER_LAUNCH, 2) whose first rows are block ids and slots."""
        if not self._free:
            self._take_back()
        if self._free:
            page = self._free.pop()
        else:
            page = torch.empty((BLOCKS_PER_LAUNCH, 2), dtype=torch.int64, pin_memory=True)
        numbers = page.numpy()
        numbers[: len(block_ids), 0] = block_ids
        numbers[: len(block_ids), 1] = slots
        return page

    def lend(self, pages: list[torch.Tensor], event: torch.cuda.Event) -> None:
        """Leave written pages to the kernels ahead of an event."""
        self._lent.append((pages, event))

    def _take_back(self) -> None:
        lent, self._lent = self._lent, []
        for pages, event in lent:
            if event.query():
                self._free += pages
            else:
                self._lent.append((pages, event))


class CudaCopyEngine(CopyEngine):
    """Loads run on streams of high priority, stores on streams of low priority."""

    def __init__(self, layout: Layout, pool: HostPool, num_streams: int) -> None:
        super().__init__(layout, pool)
        runs = layout.run_table()
        self.shape = LaunchShape.of(runs, pool.slot_bytes)
        self._device = layout.device
        self._runs = runs.to(self._device)
        self._streams = _open_streams(self._device, num_streams)
        self._id_pages = _IdPages()
        self._warm_up()

    def _warm_up(self) -> None:
        """Compile both kernels now, and find out here if this GPU cannot run them.

        Block 0 goes to slot 0 and back, and so stays as it is.

        Raises:
            TransferError: it cannot.
        """
        first = np.zeros(1, np.int64)
        for direction in (Direction.STORE, Direction.LOAD):
            self.copy(direction, first, first).wait()

    def copy(self, direction: Direction, block_ids: BlockIds, slots: BlockIds) -> Ticket:
        with torch.cuda.device(self._device):
            try:
                return CudaTicket(self._enqueue(direction, block_ids, slots))
            except Exception as error:  # Triton raises errors of many unrelated classes
                if direction is Direction.STORE:
                    raise TransferError(f"store could not be launched: {error}") from error
                return CudaTicket(self._load_plainly(block_ids, slots, error))

    def fence(self, ticket: Ticket) -> None:
        assert isinstance(ticket, CudaTicket)
        torch.cuda.current_stream(self._device).wait_event(ticket.event)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # a GPU that failed; its tickets say so
            torch.cuda.synchronize(self._device)
        self._id_pages = _IdPages()

    def _enqueue(
        self, direction: Direction, block_ids: BlockIds, slots: BlockIds
    ) -> torch.cuda.Event:
        """Launch the kernel behind the current stream's work; returns the event behind it."""
        stream = next(self._streams[direction])
        stream.wait_stream(torch.cuda.current_stream())
        pages: list[torch.Tensor] = []
        try:
            with torch.cuda.stream(stream):
                for start in range(0, len(block_ids), BLOCKS_PER_LAUNCH):
                    part = slice(start, start + BLOCKS_PER_LAUNCH)
                    pages.append(self._id_pages.write(block_ids[part], slots[part]))
                    self._launch(direction, pages[-1], len(block_ids[part]))
            event = torch.cuda.Event()
            event.record(stream)
        except Exception:
            with contextlib.suppress(RuntimeError):  # what did start ends before its slots go
                stream.synchronize()
            raise
        self._id_pages.lend(pages, event)
        return event

    def _load_plainly(
        self, block_ids: BlockIds, slots: BlockIds, reason: Exception
    ) -> torch.cuda.Event:
        """Load without the kernel, while the host waits: vLLM was promised these bytes.

        A vLLM that schedules asynchronously has the next step under way when it hears of a failed
        load, and keeps the token of that step; its second model runner never goes back to the
        failed block. To tell it (`Worker.take_bad_blocks`) is therefore the last resort.

        Raises:
            TransferError: torch cannot do it either.
        """
        logger.warning("A load could not be launched (%s); copying it slowly.", reason)
        pages = [(page.view, page.slot_offset) for page in self.layout.pages]
        ids, places = torch.from_numpy(block_ids), torch.from_numpy(slots)
        event = torch.cuda.Event()
        try:
            paged_copy_reference(pages, ids, places, self.pool.bytes, store=False)
            event.record()
        except RuntimeError as error:
            raise TransferError(f"load of {len(ids)} blocks failed: {error}") from error
        return event

    def _launch(self, direction: Direction, ids: torch.Tensor, num_blocks: int) -> None:
        paged_copy(
            self._runs,
            ids,
            self.pool.bytes,
            num_blocks,
            self.shape.chunks_per_run,
            store=direction is Direction.STORE,
            word=self.shape.word,
            chunk_words=self.shape.chunk_words,
            programs=self.shape.programs,
            num_warps=self.shape.num_warps,
        )


def _open_streams(
    device: torch.device, number: int
) -> dict[Direction, Iterator[torch.cuda.Stream]]:
    """Half of the streams for each direction, taken in turn; a single one serves both."""
    if number == 1:
        only = cycle([torch.cuda.Stream(device)])
        return {Direction.LOAD: only, Direction.STORE: only}
    loads = [torch.cuda.Stream(device, priority=-1) for _ in range(number // 2)]
    stores = [torch.cuda.Stream(device, priority=0) for _ in range(number - number // 2)]
    return {Direction.LOAD: cycle(loads), Direction.STORE: cycle(stores)}
