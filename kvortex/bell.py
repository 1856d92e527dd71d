"""Bell: what threads sleep on until others have something for one of them."""

from __future__ import annotations

import contextlib
from threading import Lock


class Bell:
    """Remembers one ring; more, while nobody listened, are the same.

    A bare lock, taken while nobody rang: to ring costs a tenth of a microsecond, where an Event
    takes a lock and a list of waiters, and whoever waits has given up the GIL. Of several threads
    that wait it wakes one.
    """

    def __init__(self) -> None:
        self._silence = Lock()
        self._silence.acquire()

    def ring(self) -> None:
        """Wake a thread that waits, or have the next wait return at once."""
        if self._silence.locked():  # to meet the error costs more than to ask
            with contextlib.suppress(RuntimeError):  # another thread was faster
                self._silence.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until it rings, at most `timeout` seconds; returns whether it rang."""
        return self._silence.acquire(timeout=-1 if timeout is None else max(0.0, timeout))
