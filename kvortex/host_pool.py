"""HostPool: one arena of host memory cut into slots, pinned and mapped into the GPU if any."""

from __future__ import annotations

import logging
import math
import mmap
import resource
import time
from typing import TYPE_CHECKING, Self

import torch

from kvortex.config import GIB
from kvortex.core import PoolAllocationError
from kvortex.free_memory import free_memory_bytes
from kvortex.host_memory import HostMemory, huge_pages_allowed
from kvortex.numa import choose_node, nodes_of, prefer_node
from kvortex.preparation import Preparation

if TYPE_CHECKING:
    from types import TracebackType

    from kvortex.config import KVortexConfig
    from kvortex.layout import Layout

logger = logging.getLogger(__name__)

PIECE_BYTES = 256 << 20
CHECKSUM_BYTES = 8
ENOUGH_ON_NODE = 0.99


class HostPool:
    """Slots of `slot_bytes`; `bytes` is the uint8 tensor of all of them, one a row.

    The first `num_ready_slots` may be used. Memory that is not pinned is ready at once, and
    populated as it is touched. Of pinned memory the first piece is ready on return, and a thread
    prepares the others; where it finds no more memory, the pool stays as large as it is then.

    A piece is `piece_slots` slots; no copy by DMA may reach from one into the next.

    `running_checksums` is an int64 tensor (num_parts, num_slots), ready and pinned from the start:
    of each slot's bytes up to the end of a part, or UNCOUNTED. `checksums` are those of the last
    part, which are of the whole.

    Args:
        num_slots: to begin with.
        slot_bytes: of each.
        pinned: and mapped into the GPU.
        node: of NUMA, where the memory shall be.
        num_parts: of a block (see `Layout.parts`), where they are compared one by one.

    Raises:
        PoolAllocationError: the memory could not be had, or none of it be pinned.
    """

    def __init__(
        self,
        num_slots: int,
        slot_bytes: int,
        pinned: bool,
        node: int | None = None,
        num_parts: int = 1,
    ) -> None:
        self.slot_bytes = slot_bytes
        self._num_slots = num_slots
        self._size = num_slots * slot_bytes
        try:
            self._memory = HostMemory(self._size)
        except (OSError, OverflowError, ValueError) as error:
            raise PoolAllocationError(_cannot("allocate", self._size, error)) from error
        self.address = self._memory.address
        self.bytes = self._memory.bytes.view(num_slots, slot_bytes)
        self._beside = HostMemory(num_parts * num_slots * CHECKSUM_BYTES)
        self.running_checksums = self._beside.bytes.view(torch.int64).view(num_parts, num_slots)
        self.checksums = self.running_checksums[-1]
        self.piece_slots = slots_of_a_piece(slot_bytes)
        self._node = node
        if node is not None and not prefer_node(self.address, self._size, node):
            self._node = None
        self._began = time.perf_counter()
        self._preparation: Preparation | None = None
        if pinned:
            if not huge_pages_allowed():
                logger.info("Transparent huge pages are off; with them memory is pinned sooner.")
            self._pin_checksums()
            piece_bytes = self.piece_slots * slot_bytes
            self._preparation = Preparation(self._memory, piece_bytes, self._tell_end)
            self._require(min(piece_bytes, self._size))

    @property
    def num_ready_slots(self) -> int:
        """How many may be used now; never fewer than before."""
        if self._preparation is None:
            return self._num_slots
        return self._preparation.ready_bytes // self.slot_bytes

    @property
    def num_slots(self) -> int:
        """How many there are, ready or not yet; fewer than at first once memory ran out."""
        ended = self._preparation is not None and self._preparation.ended
        return self.num_ready_slots if ended else self._num_slots

    def wait_until_ready(self) -> None:
        """Block until every slot is ready.

        Raises:
            PoolAllocationError: there was no memory for some; the pool is closed.
        """
        self._require(self._size)

    @property
    def pinned_bytes(self) -> int:
        """How many bytes are pinned now."""
        return self._memory.pinned_bytes + self._beside.pinned_bytes

    def close(self) -> None:
        """Stop preparing, unpin, and give the memory back with the last view of it.

        May be called twice. No transfer may be under way.
        """
        if self._preparation is not None:
            self._preparation.stop()
        self.bytes = torch.empty((0, self.slot_bytes), dtype=torch.uint8)
        self.running_checksums = torch.empty((1, 0), dtype=torch.int64)
        self.checksums = self.running_checksums[-1]
        self._memory.close()
        self._beside.close()

    def _require(self, nbytes: int) -> None:
        """Wait until so many bytes are ready; close the pool if they never will be."""
        preparation = self._preparation
        if preparation is not None and not preparation.wait(nbytes):
            self.close()
            raise PoolAllocationError(_cannot("pin", self._size, preparation.error))

    def _pin_checksums(self) -> None:
        """A few bytes beside each slot; without them nothing could be verified."""
        try:
            self._beside.pin(0, self._beside.size)
        except PoolAllocationError as error:
            self.close()
            raise PoolAllocationError(_cannot("pin", self._size, error)) from error

    def _tell_end(self, preparation: Preparation) -> None:
        """All is prepared that ever will be. On the thread that did it."""
        ready, error = preparation.ready_bytes, preparation.error
        if not ready:
            return  # the constructor raises
        took = time.perf_counter() - self._began
        logger.info("%s GiB of host memory were ready after %.1f s.", _gib(ready), took)
        if error is not None:
            self._memory.release(ready)
            whole = _gib(self._size)
            logger.warning("Only %s of %s GiB of host memory: %s.", _gib(ready), whole, error)
        if self._node is not None:
            self._tell_place(self._node, ready)

    def _tell_place(self, node: int, ready: int) -> None:
        placed = nodes_of(self.address, ready)
        wrong = bool(placed) and placed.get(node, 0) < ENOUGH_ON_NODE
        level = logging.WARNING if wrong else logging.INFO
        shown = ", ".join(f"{share:.0%} on node {number}" for number, share in placed.items())
        logger.log(level, "Host memory for NUMA node %d is %s.", node, shown or "somewhere")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_pool(config: KVortexConfig, layout: Layout, num_slots: int) -> HostPool:
    """A pool for blocks of a layout, close to the GPU that they are on.

    Raises:
        ConfigError: this machine has no such NUMA node.
        PoolAllocationError: see HostPool.
    """
    node = choose_node(config.numa_node, layout.device)
    on_gpu = layout.device.type == "cuda"
    num_parts = len(layout.parts()) if on_gpu else 1
    return HostPool(num_slots, layout.slot_bytes, on_gpu, node, num_parts)


def slots_of_a_piece(slot_bytes: int) -> int:
    """The most slots in PIECE_BYTES that are whole pages; of odd sizes it may take more bytes."""
    least = math.lcm(slot_bytes, mmap.PAGESIZE) // slot_bytes
    return least * max(1, PIECE_BYTES // (least * slot_bytes))


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2g}"


def _cannot(verb: str, size: int, reason: object) -> str:
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shown = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / GIB:.1f} GiB"
    return (
        f"cannot {verb} {size / GIB:.1f} GiB of host memory ({reason}): "
        f"{free_memory_bytes() / GIB:.1f} GiB are free, ulimit -l is {shown}; lower ram_pool_gb"
    )
