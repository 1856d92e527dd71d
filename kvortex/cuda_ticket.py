"""CudaTicket: an event behind a copy, taken from a pool of events that are used again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvortex.copy_engine import Ticket
from kvortex.cuda_driver import cuda_driver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvortex.cuda_driver import Handle
    from kvortex.judgement import Judgement

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
    """Done when the GPU has passed the point of `stream` at which this was made.

    Args:
        events: where its own comes from.
        stream: of CUDA.
        judgement: on what was loaded up to that point, settled as soon as it is known to be passed;
            None if nobody judges that.
    """

    def __init__(
        self, events: EventPool, stream: Handle, judgement: Judgement | None = None
    ) -> None:
        self._driver = cuda_driver()
        self._events = events
        self._event: Handle | None = None
        self._judgement = judgement
        event = events.take()
        self._driver.record(event, stream)
        self._event = event

    @property
    def done(self) -> bool:
        if self._event is None:
            return True
        if not self._events.closed:
            if not self._driver.reached(self._event):
                return False
            self._events.give(self._event)
        self._event = None
        if self._judgement is not None:
            self._judgement.settle()
        return True

    @property
    def bad_block_ids(self) -> Sequence[int]:
        return self._judgement.bad_block_ids if self._judgement is not None else ()

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
