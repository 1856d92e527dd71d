"""StepsUnderWay: which steps vLLM planned and has no report of, and what each computes.

Scheduler side. With vLLM's asynchronous scheduling or a pipeline there are several at a time.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvortex.connector.tracked_requests import Row

MOST_STEPS = 64
"""Kept at once; more only pile up where nobody tells of their end."""


class StepsUnderWay:
    """Finds, when a load has failed, whatever was computed from it since."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._steps: deque[tuple[int, list[Row], bool]] = deque(maxlen=MOST_STEPS)

    @property
    def wait_for_loads(self) -> bool:
        """Whether any of them waits for a load, which may yet turn out to have failed."""
        return any(waits for _, _, waits in self._steps)

    def begin(self, step: int, rows: list[Row], *, waits: bool) -> None:
        """A step is planned; `waits` for a load or not."""
        self._steps.append((step, rows, waits))

    def drop_before(self, step: int) -> None:
        """Steps end in order: the report is that of this one."""
        while self._steps and self._steps[0][0] < step:
            self._steps.popleft()

    def spoilt_by(self, bad: Iterable[int]) -> set[int]:
        """All blocks that hold wrong bytes by now.

        Args:
            bad: GPU blocks whose load failed for the first of the steps, or before it.
        """
        spoilt = set(bad)
        for _, rows, _ in self._steps:
            self._spread(rows, spoilt)
        return spoilt

    def _spread(self, rows: list[Row], spoilt: set[int]) -> None:
        """What is computed from spoilt blocks is read by others in the very same step.

        What is computed from none is good, whatever was there before.
        """
        wrong, right = self._split(rows, spoilt)
        while wrong:
            spoilt.update(*map(self._written, wrong))
            wrong, right = self._split(right, spoilt)
        spoilt.difference_update(*map(self._written, right))

    def _split(self, rows: list[Row], spoilt: set[int]) -> tuple[list[Row], list[Row]]:
        """Those that read a spoilt block, and those that do not."""
        split: tuple[list[Row], list[Row]] = [], []
        for row in rows:
            split[spoilt.isdisjoint(self._read(row))].append(row)
        return split

    def _read(self, row: Row) -> list[int]:
        _, block_ids, first, _ = row
        held = -(-first // self._block_tokens)
        return [block_id for ids in block_ids for block_id in ids[:held]]

    def _written(self, row: Row) -> list[int]:
        _, block_ids, first, last = row
        size = self._block_tokens
        return [i for ids in block_ids for i in ids[first // size : -(-last // size)]]
