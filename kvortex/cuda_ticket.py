"""CudaTicket: an event behind a copy, taken from a pool of events that are used again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvortex.copy_engine import Ticket
from kvortex.cuda_driver import cuda_driver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvortex.cuda_driver import Handle
    from kvortex.id_ring import IdRing

POLL_SECONDS = 50e-6


class EventPool:
    """Events that nobody waits for; `take` makes one only where none is left.

    Args:
        timed: whether the GPU notes when each is reached.
    """

    def __init__(self, *, timed: bool = False) -> None:
        self.closed = False
        self._timed = timed
        self._driver = cuda_driver()
        self._free: list[Handle] = []
        self._all: list[Handle] = []

    def take(self) -> Handle:
        """An event to record."""
        if self._free:
            return self._free.pop()
        self._all.append(self._driver.create_event(timed=self._timed))
        return self._all[-1]

    def give(self, event: Handle) -> None:
        """An event that was reached, or never recorded."""
        self._free.append(event)

    def close(self) -> None:
        """Destroy every event. All must have been reached: their tickets are done from now on."""
        self.closed = True
        self._free.clear()
        while self._all:
            self._driver.destroy_event(self._all.pop())


class CudaTicket(Ticket):
    """Done when the GPU has passed the point of `stream` at which this was made."""

    def __init__(self, events: EventPool, stream: Handle) -> None:
        self._driver = cuda_driver()
        self._events = events
        self._event: Handle | None = None
        self._ids: IdRing | None = None
        self._rows: Sequence[range] = ()
        self._parts: Sequence[CudaTicket] = ()
        self._bad: list[int] = []
        event = events.take()
        self._driver.record(event, stream)
        self._event = event

    def judge(self, ids: IdRing, rows: Sequence[range], parts: Sequence[CudaTicket] = ()) -> None:
        """Have `bad_block_ids` tell of these rows, and of what earlier tickets of a copy tell."""
        self._ids, self._rows, self._parts = ids, rows, parts

    def add_bad(self, block_ids: list[int]) -> None:
        """Blocks that somebody else found to be wrong."""
        self._bad = block_ids

    @property
    def done(self) -> bool:
        if self._event is None:
            return True
        if not self._events.closed:
            if not self._driver.reached(self._event):
                return False
            self._events.give(self._event)
        self._event = None
        if self._ids is not None:
            self._bad = [block_id for rows in self._rows for block_id in self._ids.take_bad(rows)]
        return True

    @property
    def bad_block_ids(self) -> list[int]:
        bad = list(self._bad)
        for part in self._parts:  # on the same stream, before this one
            if part.done:
                bad += part.bad_block_ids
        return bad

    def __del__(self) -> None:
        """Nobody looks any more: who waits for the event already does, so it may be used again."""
        if self._event is not None and not self._events.closed:
            self._events.give(self._event)

    def wait(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def hold(self, stream: Handle) -> None:
        """Let a stream wait for the copy; the host does not wait."""
        if not (self._event is None or self._events.closed):
            self._driver.wait(stream, self._event)
