"""What CUDA does to register host memory, by a list: for machines without a GPU."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvortex.core import PoolAllocationError

if TYPE_CHECKING:
    import pytest


class Registrations:
    """Ranges that are registered now, address to bytes.

    From number `hold_at` on a registration waits for `go`, and number `refuse_at` is refused. The
    pieces of a pool are counted from 0; before them come its checksums.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now: dict[int, int] = {}
        self.count = -1
        self.hold_at: int | None = None
        self.refuse_at: int | None = None
        self.held = threading.Event()
        self.go = threading.Event()
        patch.setattr("kvortex.host_memory._register", self._register)
        patch.setattr("kvortex.host_memory._unregister", self.now.pop)

    def _register(self, address: int, nbytes: int) -> None:
        number, self.count = self.count, self.count + 1
        if self.hold_at is not None and number >= self.hold_at:
            self.held.set()
            assert self.go.wait(60)
        if number == self.refuse_at:
            raise PoolAllocationError("out of memory")
        for start, size in self.now.items():
            assert address + nbytes <= start or start + size <= address, "registered twice"
        self.now[address] = nbytes
