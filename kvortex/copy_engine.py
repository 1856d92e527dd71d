"""CopyEngine: moves blocks between KV tensors and the host pool. Worker side, one thread.

Here are the interface and the engine for machines without a GPU.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvortex.cargo import Cargo
from kvortex.checksum import checksum_of, signed
from kvortex.core import Direction, TransferError
from kvortex.speedometer import LEAST_BYTES, Speedometer
from kvortex.triton_kernels.reference import clear_blocks, paged_copy_reference
from kvortex.verification import Sampling, seeds_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvortex.core import BlockIds
    from kvortex.host_pool import HostPool
    from kvortex.layout import Layout
    from kvortex.verification import Verification


class Ticket(ABC):
    """A copy under way."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether the bytes have arrived; never blocks.

        Raises:
            TransferError: the copy failed.
        """

    @property
    def bad_block_ids(self) -> Sequence[int]:
        """GPU blocks that were loaded and are not what was stored; known once it is `done`.

        They hold zeros then.
        """
        return ()

    @abstractmethod
    def wait(self, timeout: float | None = None) -> bool:
        """Block the caller until `done`, at most `timeout` seconds; returns `done`."""


class CopyEngine(ABC):
    """Copies whole blocks of one layout. Ids and slots are trusted: callers check them.

    Args:
        layout: of the KV tensors.
        pool: of the slots.
        verification: what is kept in the pool's checksums, and compared; None is nothing.
    """

    def __init__(
        self, layout: Layout, pool: HostPool, verification: Verification | None = None
    ) -> None:
        self.layout = layout
        self.pool = pool
        self.verification = verification
        self._speedometers = {way: Speedometer() for way in Direction}

    def bytes_per_s(self, direction: Direction) -> float | None:
        """How fast large copies were of late, whatever ran beside; None if none was measured."""
        return self._speedometers[direction].bytes_per_s

    def copy(
        self,
        direction: Direction,
        block_ids: BlockIds,
        slots: BlockIds,
        seeds: BlockIds | None = None,
    ) -> Ticket:
        """Start copying, after all work so far on the caller's current stream.

        Args:
            direction: STORE from the KV tensors to the slots, LOAD back.
            block_ids: int64 (n,).
            slots: int64 (n,).
            seeds: int64 (n,), what the checksum of each block starts from (`checksum.seed_of`);
                None is zeros.

        Raises:
            TransferError: nothing is under way, though some bytes may have been written.
        """
        return self._copy(direction, self._cargo(block_ids, slots, seeds))

    def load_layers(
        self, block_ids: BlockIds, slots: BlockIds, seeds: BlockIds | None = None
    ) -> Sequence[Ticket]:
        """Start loading blocks in the order of the layout's pages; a ticket for each page.

        Only the last of them tells of bad blocks.

        Raises:
            TransferError: nothing is under way, though some bytes may have been written.
        """
        return self._load_layers(self._cargo(block_ids, slots, seeds))

    def wrong_layers(self, slot: int, seed: int) -> str:  # noqa: ARG002
        """Where a slot does not hold what was stored there from this seed, in words, or nothing if
        that is not known; may be slow."""
        return ""

    @abstractmethod
    def fence(self, ticket: Ticket) -> None:
        """Make the caller's current stream wait for a copy; the host does not wait."""

    @abstractmethod
    def close(self) -> None:
        """Let copies end and give streams and pinned buffers back; the pool stays."""

    @abstractmethod
    def _copy(self, direction: Direction, cargo: Cargo) -> Ticket:
        """What `copy` promises."""

    @abstractmethod
    def _load_layers(self, cargo: Cargo) -> Sequence[Ticket]:
        """What `load_layers` promises."""

    def _cargo(self, block_ids: BlockIds, slots: BlockIds, seeds: BlockIds | None = None) -> Cargo:
        """The one place where seeds become what checksums start from."""
        return Cargo(block_ids, slots, seeds_from(seeds, len(block_ids), self.verification))

    def _clear(self, wrong: list[int]) -> None:
        """Nobody is to compute from bytes that are wrong, which may be no numbers at all."""
        if wrong:
            clear_blocks([page.view for page in self.layout.pages], wrong)


class _Arrived(Ticket):
    done = True

    def __init__(self, bad_block_ids: Sequence[int] = ()) -> None:
        self._bad = bad_block_ids

    @property
    def bad_block_ids(self) -> Sequence[int]:
        return self._bad

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        return True


class CpuCopyEngine(CopyEngine):
    """Copies at once with torch, for KV tensors in host memory."""

    def __init__(
        self, layout: Layout, pool: HostPool, verification: Verification | None = None
    ) -> None:
        super().__init__(layout, pool, verification)
        self._sampling = Sampling(verification)

    def _copy(self, direction: Direction, cargo: Cargo) -> Ticket:
        pages = [(page.view, page.slot_offset) for page in self.layout.pages]
        ids, places = torch.from_numpy(cargo.block_ids), torch.from_numpy(cargo.slots)
        store = direction is Direction.STORE
        began = time.perf_counter()
        try:
            paged_copy_reference(pages, ids, places, self.pool.bytes, store=store)
        except (RuntimeError, IndexError) as error:
            raise TransferError(
                f"{direction.value} of {len(cargo)} blocks failed: {error}"
            ) from error
        nbytes = len(cargo) * self.pool.slot_bytes
        if nbytes >= LEAST_BYTES:
            self._speedometers[direction].note(nbytes, time.perf_counter() - began)
        if not self._sampling.next(direction):
            return _Arrived()
        checksums = self._checksums(cargo)
        kept = self.pool.checksums.numpy()
        if direction is Direction.LOAD:
            wrong: list[int] = cargo.block_ids[kept[cargo.slots] != checksums].tolist()
            if wrong:
                self._sampling.found_wrong()
            self._clear(wrong)
            return _Arrived(wrong)
        kept[cargo.slots] = checksums
        return _Arrived()

    def _checksums(self, cargo: Cargo) -> BlockIds:
        """Of what the slots hold."""
        memory, size = memoryview(self.pool.bytes.numpy().data).cast("B"), self.pool.slot_bytes
        sums = (
            signed(checksum_of(memory[slot * size : (slot + 1) * size], seed))
            for slot, seed in zip(cargo.slots.tolist(), cargo.seeds.tolist(), strict=True)
        )
        return np.fromiter(sums, np.int64, len(cargo))

    def _load_layers(self, cargo: Cargo) -> Sequence[Ticket]:
        return [self._copy(Direction.LOAD, cargo)] * len(self.layout.pages)

    def fence(self, ticket: Ticket) -> None:
        """Nothing to do: copies are done when `copy` returns."""

    def close(self) -> None:
        """Nothing to give back."""
