"""CopyEngine: moves blocks between KV tensors and the host pool. Worker side, one thread.

Here are the interface and the engine for machines without a GPU.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from kvortex.core import Direction, TransferError
from kvortex.speedometer import LEAST_BYTES, Speedometer
from kvortex.triton_kernels.reference import paged_copy_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvortex.core import BlockIds
    from kvortex.host_pool import HostPool
    from kvortex.layout import Layout


class Ticket(ABC):
    """A copy under way."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether the bytes have arrived; never blocks.

        Raises:
            TransferError: the copy failed.
        """

    @abstractmethod
    def wait(self, timeout: float | None = None) -> bool:
        """Block the caller until `done`, at most `timeout` seconds; returns `done`."""


class CopyEngine(ABC):
    """Copies whole blocks of one layout. Ids and slots are trusted: callers check them."""

    def __init__(self, layout: Layout, pool: HostPool) -> None:
        self.layout = layout
        self.pool = pool
        self._speedometers = {way: Speedometer() for way in Direction}

    def bytes_per_s(self, direction: Direction) -> float | None:
        """How fast large copies were of late, whatever ran beside; None if none was measured."""
        return self._speedometers[direction].bytes_per_s

    @abstractmethod
    def copy(self, direction: Direction, block_ids: BlockIds, slots: BlockIds) -> Ticket:
        """Start copying, after all work so far on the caller's current stream.

        Args:
            direction: STORE from the KV tensors to the slots, LOAD back.
            block_ids: int64 (n,).
            slots: int64 (n,).

        Raises:
            TransferError: nothing is under way, though some bytes may have been written.
        """

    @abstractmethod
    def load_layers(self, block_ids: BlockIds, slots: BlockIds) -> Sequence[Ticket]:
        """Start loading blocks in the order of the layout's pages; a ticket for each page.

        Raises:
            TransferError: nothing is under way, though some bytes may have been written.
        """

    @abstractmethod
    def fence(self, ticket: Ticket) -> None:
        """Make the caller's current stream wait for a copy; the host does not wait."""

    @abstractmethod
    def close(self) -> None:
        """Let copies end and give streams and pinned buffers back; the pool stays."""


class _Arrived(Ticket):
    done = True

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        return True


class CpuCopyEngine(CopyEngine):
    """Copies at once with torch, for KV tensors in host memory."""

    def copy(self, direction: Direction, block_ids: BlockIds, slots: BlockIds) -> Ticket:
        pages = [(page.view, page.slot_offset) for page in self.layout.pages]
        ids, places = torch.from_numpy(block_ids), torch.from_numpy(slots)
        store = direction is Direction.STORE
        began = time.perf_counter()
        try:
            paged_copy_reference(pages, ids, places, self.pool.bytes, store=store)
        except (RuntimeError, IndexError) as error:
            raise TransferError(
                f"{direction.value} of {len(ids)} blocks failed: {error}"
            ) from error
        nbytes = len(ids) * self.pool.slot_bytes
        if nbytes >= LEAST_BYTES:
            self._speedometers[direction].note(nbytes, time.perf_counter() - began)
        return _Arrived()

    def load_layers(self, block_ids: BlockIds, slots: BlockIds) -> Sequence[Ticket]:
        return [self.copy(Direction.LOAD, block_ids, slots)] * len(self.layout.pages)

    def fence(self, ticket: Ticket) -> None:
        """Nothing to do: copies are done when `copy` returns."""

    def close(self) -> None:
        """Nothing to give back."""
