"""Opens the movers of one direction over a layout and a pool."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from kvortex.calibration import DMA, STAGED, ZERO_COPY
from kvortex.movers.dma import DmaMover
from kvortex.movers.staged import StagedMover
from kvortex.movers.zero_copy import ZeroCopyMover
from kvortex.paged_kernel import PagedKernel, tiling_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from kvortex.core import Direction
    from kvortex.cuda_ticket import EventPool
    from kvortex.host_pool import HostPool
    from kvortex.id_ring import IdRing
    from kvortex.layout import Layout
    from kvortex.movers.base import Mover

logger = logging.getLogger(__name__)

BUFFERS = 2
BUFFER_BYTES = 64 << 20
"""On an H200 half of it costs 3 % of the link's speed both ways at once, a quarter 15 %."""
STAGED_PROGRAMS = 16
"""On an H100, stores without pause cost a matrix product 1 to 1.4 % so, and take 1.3 % of all SM
time; a kernel bound by memory pays 3.7 %, because staging moves every byte through HBM three times
(bench/bench_transfer.py)."""


def open_movers(
    layout: Layout,
    pool: HostPool,
    direction: Direction,
    names: Collection[str],
    programs: int,
    ids: IdRing,
    events: EventPool,
) -> dict[str, Mover]:
    """The movers of these names; without the staged one if its buffers find no room on the GPU.

    Args:
        layout: of KV tensors on the GPU.
        pool: pinned.
        direction: of every copy.
        names: some of those in `kvortex.calibration`.
        programs: grid of the zero-copy kernel.
        ids: where kernels shall find their ids.
        events: where movers get theirs.
    """
    runs = layout.run_table()
    on_gpu = runs.to(layout.device)
    tiling = tiling_of(runs, pool.slot_bytes)
    movers: dict[str, Mover] = {}
    if ZERO_COPY in names:
        kernel = PagedKernel(on_gpu, pool.bytes, tiling, direction, ids)
        movers[ZERO_COPY] = ZeroCopyMover(kernel, programs, pool.address, ids)
    if DMA in names:
        judge = None
        if ids.verdicts is not None:
            judge = PagedKernel(on_gpu, pool.bytes, tiling, direction, ids, copy=False)
        movers[DMA] = DmaMover(direction, runs, pool, judge, ids, events)
    if STAGED in names:
        try:
            buffers = _buffers(layout, pool)
            kernel = PagedKernel(on_gpu, buffers[0], tiling, direction, ids, dense=True)
            movers[STAGED] = StagedMover(
                kernel, direction, buffers, STAGED_PROGRAMS, pool, ids, events
            )
        except torch.OutOfMemoryError:
            logger.warning(
                "No %d MiB are left on %s for staging; large copies will be slower. "
                "Lower gpu_memory_utilization to have them.",
                BUFFERS * BUFFER_BYTES >> 20,
                layout.device,
            )
    return movers


def _buffers(layout: Layout, pool: HostPool) -> torch.Tensor:
    blocks = min(pool.num_slots, max(1, BUFFER_BYTES // pool.slot_bytes))
    shape = (BUFFERS, blocks, pool.slot_bytes)
    return torch.zeros(shape, dtype=torch.uint8, device=layout.device)
