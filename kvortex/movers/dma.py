"""DmaMover: one descriptor of the copy engine for each contiguous stretch, a few hundred in a call.

A kernel sums up what is on the GPU's side of the copy, beside it on a stream of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kvortex.core import Direction
from kvortex.cuda_driver import cuda_driver
from kvortex.movers.base import Mover

if TYPE_CHECKING:
    from kvortex.cargo import Cargo
    from kvortex.core import BlockIds
    from kvortex.cuda_driver import Addresses, Handle
    from kvortex.cuda_ticket import EventPool
    from kvortex.host_pool import HostPool
    from kvortex.id_ring import IdRing
    from kvortex.paged_kernel import PagedKernel


PART_BYTES = 16 << 20
"""Of a copy that are handed to the driver together, and summed up while the next are under way. In
pages of 64 KiB, half a GiB in one call reaches 40 GB/s on an H200, and 54 in calls of 8 to 32 MiB.
"""
SUMMING_PROGRAMS = 16
"""Their end, which nothing hides, then costs less than 1 %; with half as many 2 %."""


class DmaMover(Mover):
    """Takes no program of the GPU but for sums; good for runs of megabytes, poor below 64 KiB.

    Args:
        direction: of every copy.
        runs: int64 (num_runs, 4) on the CPU, see `Layout.run_table`.
        pool: pinned.
        kernel: that copies nothing; None if nothing is to be summed up.
        ids: where it finds its ids.
        events: where its own come from.
    """

    def __init__(
        self,
        direction: Direction,
        runs: torch.Tensor,
        pool: HostPool,
        kernel: PagedKernel | None,
        ids: IdRing,
        events: EventPool,
    ) -> None:
        self._kernel = kernel
        self._ids = ids
        self._stream = torch.cuda.Stream(kernel.device) if kernel is not None else None
        self._side: Handle = self._stream.cuda_stream if self._stream is not None else 0
        self._arrived, self._summed = events.take(), events.take()
        self._part_blocks = max(1, PART_BYTES // pool.slot_bytes)
        self._store = direction is Direction.STORE
        self._base, self._stride, self._offset, self._size = runs.numpy().T.astype(np.uint64)
        self._slots = np.uint64(pool.address)
        self._slot_bytes = np.uint64(pool.slot_bytes)
        self._piece_slots = pool.piece_slots
        self._driver = cuda_driver()

    def submit(self, cargo: Cargo, stream: Handle, *, summed: bool) -> None:
        if not len(cargo):
            return
        row = self._ids.write(cargo) if summed else 0
        for part in cargo.cut(self._part_blocks):
            self._copy(part, stream)
            if summed:
                self._sum_up(row, len(part), stream)
                row += len(part)
        if summed:
            self._driver.record(self._summed, self._side)
            self._driver.wait(stream, self._summed)

    def _sum_up(self, row: int, count: int, stream: Handle) -> None:
        """Beside what comes next on the stream, behind what it was given so far."""
        assert self._kernel is not None
        self._driver.record(self._arrived, stream)
        self._driver.wait(self._side, self._arrived)
        ids, slots = self._ids.address, int(self._slots)
        self._kernel.launch(ids, row, slots, count, SUMMING_PROGRAMS, self._side, summed=True)

    def _copy(self, cargo: Cargo, stream: Handle) -> None:
        ids, places = (of.astype(np.uint64)[:, None] for of in (cargo.block_ids, cargo.slots))
        gpu = (self._base + ids * self._stride).ravel()
        host = (self._slots + places * self._slot_bytes + self._offset).ravel()
        pieces = np.repeat(cargo.slots // self._piece_slots, len(self._size))
        gpu, host, sizes = merged(gpu, host, np.tile(self._size, len(cargo)), pieces)
        if self._store:
            self._driver.copy_batch(host, gpu, sizes, stream)
        else:
            self._driver.copy_batch(gpu, host, sizes, stream)


def merged(
    one: Addresses, other: Addresses, sizes: Addresses, pieces: BlockIds
) -> tuple[Addresses, Addresses, Addresses]:
    """Join neighbours that follow each other on both sides, within one piece of the pool.

    All four are of shape (n,); `pieces` tells in which piece each one is.
    """
    if len(sizes) < 2:
        return one, other, sizes
    follows = (one[:-1] + sizes[:-1] == one[1:]) & (other[:-1] + sizes[:-1] == other[1:])
    follows &= pieces[:-1] == pieces[1:]
    starts = np.concatenate(([0], np.flatnonzero(~follows) + 1))
    return one[starts], other[starts], np.add.reduceat(sizes, starts)
