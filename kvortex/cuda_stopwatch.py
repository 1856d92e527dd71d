"""CudaStopwatch: times large copies of one direction on the GPU. Worker side, one thread."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvortex.core import TransferError
from kvortex.cuda_driver import cuda_driver
from kvortex.cuda_ticket import EventPool
from kvortex.speedometer import LEAST_BYTES

if TYPE_CHECKING:
    from kvortex.cuda_driver import Handle
    from kvortex.speedometer import Speedometer

MOST_TIMED = 16
"""Copies under way at once that are timed; more would only tell the same again."""


@dataclass(slots=True, eq=False)
class _Lap:
    begin: Handle
    end: Handle
    nbytes: int = 0


class CudaStopwatch:
    """Two events around a copy, on the stream that carries it; the host waits for neither.

    Copies overlap, and what they share of the link is counted once: like a step of `StepClock`,
    each takes from when the one before it ended. All events are made at the start.

    Args:
        speedometer: is told.
        block_bytes: of one block on the link.
    """

    def __init__(self, speedometer: Speedometer, block_bytes: int) -> None:
        self._speedometer = speedometer
        self._block_bytes = block_bytes
        self._least_blocks = -(-LEAST_BYTES // block_bytes)
        self._driver = cuda_driver()
        self._events = EventPool(timed=True)
        self._free = [_Lap(self._events.take(), self._events.take()) for _ in range(MOST_TIMED + 1)]
        self._under_way: deque[_Lap] = deque()
        self._last = self._free.pop()
        self._driver.record(self._last.end, 0)

    def begin(self, num_blocks: int, stream: Handle) -> None:
        """What the stream is given next copies so many blocks; `end` follows unless that failed."""
        if num_blocks >= self._least_blocks and self._free:
            self._driver.record(self._free[-1].begin, stream)

    def end(self, num_blocks: int, stream: Handle) -> None:
        """The stream was given the whole copy."""
        if num_blocks >= self._least_blocks and self._free:
            lap = self._free[-1]
            self._driver.record(lap.end, stream)
            lap.nbytes = num_blocks * self._block_bytes
            self._under_way.append(self._free.pop())

    def read(self) -> None:
        """Tell the speedometer of copies that ended."""
        nbytes, seconds = 0, 0.0
        try:
            while self._under_way and self._driver.reached(self._under_way[0].end):
                lap = self._under_way.popleft()
                seconds += self._stop(lap)
                nbytes += lap.nbytes
        except TransferError:  # the GPU failed; the copies' tickets say so
            self._under_way.clear()
        if nbytes:
            self._speedometer.note(nbytes, seconds)

    def close(self) -> None:
        """Destroy the events; those under way must have been reached."""
        self._free.clear()
        self._under_way.clear()
        self._events.close()

    def _stop(self, lap: _Lap) -> float:
        """For how long nothing but this copy was the latest to end."""
        later = self._driver.seconds_between(self._last.end, lap.end)
        if later <= 0:  # on another stream one that began after it was sooner there
            self._free.append(lap)
            return 0.0
        self._free.append(self._last)
        self._last = lap
        return min(later, self._driver.seconds_between(lap.begin, lap.end))
