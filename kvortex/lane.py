"""Lane: puts the copies of one direction on CUDA streams; what one thread needs for that."""

from __future__ import annotations

import contextlib
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING

import torch

from kvortex.calibration import ZERO_COPY
from kvortex.core import Direction
from kvortex.cuda_driver import cuda_driver
from kvortex.cuda_ticket import CudaTicket
from kvortex.judgement import Judgement
from kvortex.movers import ZeroCopyMover

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvortex.cargo import Cargo
    from kvortex.cuda_driver import Handle
    from kvortex.cuda_stopwatch import CudaStopwatch
    from kvortex.cuda_ticket import EventPool
    from kvortex.id_ring import IdRing
    from kvortex.movers import Mover


class Lane:
    """Streams taken in turn, the movers that fill them, and the ids that those read.

    Args:
        direction: of every copy.
        streams: of CUDA.
        movers: by name.
        ids: of these movers.
        events: shared by all lanes.
        most_blocks: that a mover takes at once.
        stopwatch: of this direction, if copies are to be timed.
    """

    def __init__(
        self,
        direction: Direction,
        streams: Sequence[Handle],
        movers: Mapping[str, Mover],
        ids: IdRing,
        events: EventPool,
        most_blocks: int,
        stopwatch: CudaStopwatch | None = None,
    ) -> None:
        self.direction = direction
        self.movers = movers
        self._streams = cycle(streams)
        self._ids = ids
        self._events = events
        self._most_blocks = most_blocks
        self._stopwatch = stopwatch
        self._driver = cuda_driver()

    def submit(self, mover: str, cargo: Cargo, before: Handle) -> CudaTicket:
        """Start a copy once the event `before` is reached.

        Raises:
            TransferError: it was not launched, and nothing of it is under way any more.
        """
        stream, summed, count = next(self._streams), self._is_summed(), len(cargo)
        judgement = None
        with self._all_or_nothing():
            self._driver.wait(stream, before)
            if self._stopwatch is not None:
                self._stopwatch.begin(count, stream)
            for part in cargo.cut(self._most_blocks):
                self.movers[mover].submit(part, stream, summed=summed)
                judgement = self._judgement(judgement) if summed else None
                ticket = CudaTicket(self._events, stream, judgement)
                self._ids.lend(ticket)
            if self._stopwatch is not None:
                self._stopwatch.end(count, stream)
        return ticket

    def submit_runs(self, cargo: Cargo, before: Handle, parts: Sequence[range]) -> list[CudaTicket]:
        """As `submit` by zero-copy, one part of the run table after the other, each its ticket.

        Raises:
            TransferError: nothing of it is under way any more.
        """
        count = len(cargo)
        if count > self._most_blocks:
            return [self.submit(ZERO_COPY, cargo, before)] * len(parts)
        stream, mover = next(self._streams), self.movers[ZERO_COPY]
        assert isinstance(mover, ZeroCopyMover)
        summed = self._is_summed()
        tickets = []
        with self._all_or_nothing():
            self._driver.wait(stream, before)
            if self._stopwatch is not None:
                self._stopwatch.begin(count, stream)
            row = self._ids.write(cargo)
            for runs in parts:
                mover.launch(row, count, stream, summed=summed, runs=runs)
                judgement = self._judgement() if summed and runs is parts[-1] else None
                tickets.append(CudaTicket(self._events, stream, judgement))
            self._ids.lend(tickets[-1])
            if self._stopwatch is not None:
                self._stopwatch.end(count, stream)
        return tickets

    def _judgement(self, earlier: Judgement | None = None) -> Judgement | None:
        """On the blocks whose ids were written last, if they are loaded."""
        if self.direction is Direction.STORE:
            return None
        return Judgement(partial(self._ids.take_bad, self._ids.written), earlier)

    def _is_summed(self) -> bool:
        return self._ids.verdicts is not None and self._ids.verdicts.next()

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """What did start ends before anyone hears of the failure and gives its slots away."""
        try:
            yield
        except BaseException:
            rows = self._ids.take_back()
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize()
                if self._ids.verdicts is not None:
                    self._ids.verdicts.forget(rows)
                    torch.cuda.synchronize()
            raise
