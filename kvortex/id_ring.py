"""IdRing: pinned memory in which kernels read their block ids and slots themselves."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from kvortex.core import BlockIds

ROW_BYTES = 16
FEW = 8
"""Up to here single numbers are written faster than numpy is called."""
MANY = 64
"""Up to here nobody looks whether copies ended: that costs time, and nothing is short of rows."""


class Reader(Protocol):
    """A copy whose kernels may still read ids."""

    @property
    def done(self) -> bool:
        """Whether they ended."""

    def wait(self, timeout: float | None = None) -> bool:
        """Block until they did."""


class IdRing:
    """Rows of (block id, slot) as int64, written in turn and lent to kernels until they ended.

    A submission allocates nothing. One thread.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.rows = torch.zeros(
            (num_rows, 2), dtype=torch.int64, pin_memory=torch.cuda.is_available()
        )
        self.address = self.rows.data_ptr()
        self._numbers = self.rows.numpy()
        self._cells = memoryview(self._numbers.data).cast("B").cast("q")
        self._next = 0
        self._written: list[tuple[int, int]] = []
        self._lent: deque[tuple[int, int, Reader]] = deque()

    def write(self, block_ids: BlockIds, slots: BlockIds) -> int:
        """Write at most `num_rows` rows side by side; returns the address of the first.

        Waits for the copies that still read those rows, if any.
        """
        count = len(block_ids)
        if self._next + count > self.num_rows:
            self._wait_for_all_from(self._next)
            self._next = 0
        start, end = self._next, self._next + count
        while self._lent and self._lent[0][0] < end and self._lent[0][1] > start:
            self._lent.popleft()[2].wait()
        if count <= FEW:
            for i in range(count):
                self._cells[2 * (start + i)] = block_ids[i]
                self._cells[2 * (start + i) + 1] = slots[i]
        else:
            self._numbers[start:end, 0] = block_ids
            self._numbers[start:end, 1] = slots
        self._next = end
        if count:
            self._written.append((start, end))
        return self.address + start * ROW_BYTES

    def lend(self, reader: Reader) -> None:
        """Leave the rows written since the last call to a copy."""
        for start, end in self._written:
            self._lent.append((start, end, reader))
        self._written.clear()
        if len(self._lent) > MANY:
            while self._lent and self._lent[0][2].done:
                self._lent.popleft()

    def _wait_for_all_from(self, row: int) -> None:
        """Rows of the last lap that lie ahead: behind them in line are those that begin anew."""
        while self._lent and self._lent[0][0] >= row:
            self._lent.popleft()[2].wait()
