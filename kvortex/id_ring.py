"""IdRing: pinned memory in which kernels read their block ids, slots and seeds themselves."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

import torch

from kvortex.verdicts import Verdicts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvortex.cargo import Cargo
    from kvortex.core import Direction
    from kvortex.host_pool import HostPool
    from kvortex.verification import Verification

COLUMNS = 3
ROW_BYTES = 8 * COLUMNS
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
    """Rows of block id, slot and seed as int64, written in turn and lent to kernels until they
    ended. A submission allocates nothing. `written` are the rows that are not lent yet. One thread.

    Args:
        num_rows: of the ring.
        verdicts: of as many rows; None if nothing is summed up.
    """

    def __init__(self, num_rows: int, verdicts: Verdicts | None = None) -> None:
        self.num_rows = num_rows
        self.verdicts = verdicts
        self.rows = torch.zeros(
            (num_rows, COLUMNS), dtype=torch.int64, pin_memory=torch.cuda.is_available()
        )
        self.address = self.rows.data_ptr()
        self._numbers = self.rows.numpy()
        self._cells = memoryview(self._numbers.data).cast("B").cast("q")
        self._next = 0
        self.written: list[range] = []
        self._lent: deque[tuple[range, Reader]] = deque()

    def write(self, cargo: Cargo) -> int:
        """Write a row for each block, at most `num_rows`, side by side; returns the first's number.

        Waits for the copies that still read those rows, if any.
        """
        block_ids, slots, seeds = cargo.block_ids, cargo.slots, cargo.seeds
        count = len(block_ids)
        if self._next + count > self.num_rows:
            self._wait_for_all_from(self._next)
            self._next = 0
        start, end = self._next, self._next + count
        while self._lent and self._lent[0][0].start < end and self._lent[0][0].stop > start:
            self._lent.popleft()[1].wait()
        if count <= FEW:
            for i, cell in enumerate(range(start * COLUMNS, end * COLUMNS, COLUMNS)):
                self._cells[cell] = block_ids[i]
                self._cells[cell + 1] = slots[i]
                self._cells[cell + 2] = seeds[i]
        else:
            self._numbers[start:end, 0] = block_ids
            self._numbers[start:end, 1] = slots
            self._numbers[start:end, 2] = seeds
        self._next = end
        if count:
            self.written.append(range(start, end))
        return start

    def lend(self, reader: Reader) -> None:
        """Leave the rows that are written to a copy."""
        for rows in self.take_back():
            self._lent.append((rows, reader))
        if len(self._lent) > MANY:
            while self._lent and self._lent[0][1].done:
                self._lent.popleft()

    def take_back(self) -> list[range]:
        """The rows that are written, of which nobody reads any yet, or any more; now none are."""
        written, self.written = self.written, []
        return written

    def take_bad(self, rows: Iterable[range]) -> list[int]:
        """Block ids of lent rows whose bytes were found wrong since the last call."""
        if self.verdicts is None:
            return []
        bad: list[int] = []
        for one in rows:
            bad += self.verdicts.take(one, self._numbers[one.start : one.stop, 0])
        return bad

    def _wait_for_all_from(self, row: int) -> None:
        """Rows of the last lap that lie ahead: behind them in line are those that begin anew."""
        while self._lent and self._lent[0][0].start >= row:
            self._lent.popleft()[1].wait()


def open_ring(
    num_rows: int,
    pool: HostPool,
    device: torch.device,
    direction: Direction,
    verification: Verification | None,
) -> IdRing:
    """A ring for the copies of one lane, with verdicts unless nothing is verified."""
    if verification is None or not verification.on:
        return IdRing(num_rows)
    return IdRing(num_rows, Verdicts(num_rows, pool, device, direction, verification))
