"""ZeroCopyMover: the kernel reads or writes mapped host memory itself; one launch, no detour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvortex.movers.base import Mover

if TYPE_CHECKING:
    from kvortex.cargo import Cargo
    from kvortex.cuda_driver import Handle
    from kvortex.id_ring import IdRing
    from kvortex.paged_kernel import PagedKernel


class ZeroCopyMover(Mover):
    """Lowest latency. Packets of 128 bytes keep it at 0.92 to 0.96 of the link (H200, PCIe 5).

    Args:
        kernel: between the KV tensors and host slots.
        programs: size of the grid.
        slots: address of slot 0.
        ids: where the kernel finds its ids.
    """

    def __init__(self, kernel: PagedKernel, programs: int, slots: int, ids: IdRing) -> None:
        self._kernel = kernel
        self._programs = programs
        self._slots = slots
        self._ids = ids

    def submit(self, cargo: Cargo, stream: Handle, *, summed: bool) -> None:
        self.launch(self._ids.write(cargo), len(cargo), stream, summed=summed)

    def launch(
        self, row: int, count: int, stream: Handle, *, summed: bool, runs: range | None = None
    ) -> None:
        """Copy all runs, or those of one part of the run table, of blocks whose ids are written."""
        if count:
            self._kernel.launch(
                self._ids.address,
                row,
                self._slots,
                count,
                self._programs,
                stream,
                summed=summed,
                runs=runs,
            )
