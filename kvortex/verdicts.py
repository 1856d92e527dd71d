"""Verdicts: what kernels sum up of each row of an IdRing, and what they find wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvortex.core import Direction
from kvortex.triton_kernels.paged_copy import Sums
from kvortex.verification import Sampling

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvortex.core import BlockIds
    from kvortex.host_pool import HostPool
    from kvortex.verification import Verification


class Verdicts:
    """`sums` is what kernels are given; its verdicts are pinned bytes that the GPU sets.

    `ways` are what `next` may say. Make none where there are no checksums.

    Args:
        num_rows: of the ring.
        pool: whose checksums are written, or compared.
        device: of the KV tensors.
        direction: of every copy.
        verification: which of them are summed up.
    """

    def __init__(
        self,
        num_rows: int,
        pool: HostPool,
        device: torch.device,
        direction: Direction,
        verification: Verification,
    ) -> None:
        pinned = torch.cuda.is_available()
        verdicts = torch.zeros(num_rows, dtype=torch.int8, pin_memory=pinned)
        checksums = pool.running_checksums
        parts = len(checksums) if direction is Direction.STORE else 1
        of_words = torch.zeros((num_rows, 1 + parts), dtype=torch.int64, device=device)
        self.sums = Sums(of_words, checksums, verdicts)
        self._found = verdicts.numpy()
        self._direction = direction
        self._sampling = Sampling(verification)
        self.ways = self._sampling.ways(direction)

    def next(self) -> bool:
        """Whether the next copy is summed up."""
        return self._sampling.next(self._direction)

    def take(self, rows: range, block_ids: BlockIds) -> list[int]:
        """Those of the rows' block ids, int64 (n,), that were found wrong since the last call.

        The kernels of these rows have ended.
        """
        found = self._found[rows.start : rows.stop]
        if not found.any():
            return []
        self._sampling.found_wrong()
        wrong: list[int] = block_ids[found != 0].tolist()
        found[:] = 0
        return wrong

    def forget(self, rows: Iterable[range]) -> None:
        """Begin anew after launches that failed, of these rows; no kernel may be under way."""
        for one in rows:
            self._found[one.start : one.stop] = 0
        self.sums.of_words.zero_()
