"""Preparation: populates and pins host memory piece by piece. A thread of the worker's process."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvortex.host_memory import HostMemory

MOST_THREADS = 16
CHUNK_ALIGNMENT = 2 << 20
"""Two threads shall not want the same huge page."""


class Preparation:
    """Under way from construction until `ended`; the first `ready_bytes` may be used meanwhile.

    While one piece is pinned the next is populated, by several threads.

    Args:
        memory: of which nothing is pinned yet.
        piece_bytes: of each piece but the last; whole pages.
        on_end: called with this on the thread, last, unless it is stopped.
    """

    def __init__(
        self, memory: HostMemory, piece_bytes: int, on_end: Callable[[Preparation], None]
    ) -> None:
        self.ready_bytes = 0
        self.error: Exception | None = None
        self.ended = False
        self._memory = memory
        self._piece_bytes = piece_bytes
        self._on_end = on_end
        self._changed = threading.Condition()
        self._stopped = False
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._run, name="kvortex-pool", daemon=True)
        self._thread.start()

    def wait(self, nbytes: int) -> bool:
        """Block until so many bytes are ready; False if they never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self.ready_bytes >= nbytes or self.ended)
        return self.ready_bytes >= nbytes

    def stop(self) -> None:
        """End it after the piece that is under way. May be called twice."""
        self._stopped = True
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # else CUDA opens a context on GPU 0
            self._prepare()
        except Exception as error:  # noqa: BLE001  (whatever it is: somebody waits for the end)
            self.error = error
        with self._changed:
            self.ended = True
            self._changed.notify_all()
        if not self._stopped:
            self._on_end(self)

    def _prepare(self) -> None:
        size = self._memory.size
        starts = range(0, size, self._piece_bytes)
        count = min(MOST_THREADS, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(count, "kvortex-populate") as threads:
            coming = self._populate(threads, count, 0)
            for start in starts:
                here, coming = coming, self._populate(threads, count, start + self._piece_bytes)
                for part in here:
                    part.result()
                if self._stopped:
                    return
                end = min(size, start + self._piece_bytes)
                self._memory.pin(start, end - start)
                with self._changed:
                    self.ready_bytes = end
                    self._changed.notify_all()

    def _populate(self, threads: ThreadPoolExecutor, count: int, start: int) -> list[Future[None]]:
        """Start populating the piece that begins at `start`, if any, a part on each thread."""
        end = min(self._memory.size, start + self._piece_bytes)
        part = -(-self._piece_bytes // (count * CHUNK_ALIGNMENT)) * CHUNK_ALIGNMENT
        return [
            threads.submit(self._memory.populate, first, min(part, end - first))
            for first in range(start, end, part)
        ]
