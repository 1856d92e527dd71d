"""Mover: what the copy engine asks of each way to carry blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvortex.cargo import Cargo
    from kvortex.cuda_driver import Handle


class Mover(ABC):
    """Puts copies of one direction on a stream and returns at once; called by one thread only."""

    @abstractmethod
    def submit(self, cargo: Cargo, stream: Handle, *, summed: bool) -> None:
        """Copy blocks after the stream's work so far; what it is given next comes after them.

        Args:
            cargo: any number of blocks, also none.
            stream: of CUDA.
            summed: keep the checksum of what is stored, or judge what is loaded.

        Raises:
            TransferError: some of it could not be launched.
        """
