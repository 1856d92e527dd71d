"""Prefetcher: has blocks brought from disk before a request runs, and says how long to wait."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvortex.config import KVortexConfig
    from kvortex.connector.load_planner import LoadPlanner
    from kvortex.connector.tracked_request import TrackedRequest
    from kvortex.metrics import Counters
    from kvortex.overflow import Overflow


class Prefetcher:
    """A request is held back while what it waits for comes from disk, up to the deadline.

    Args:
        config: of the connector.
        overflow: between host and disk.
        loads: which knows what pays.
        counters: where late requests are counted.
    """

    def __init__(
        self, config: KVortexConfig, overflow: Overflow, loads: LoadPlanner, counters: Counters
    ) -> None:
        self._deadline_s = config.disk_read_deadline_ms / 1e3
        self._overflow = overflow
        self._fetches = overflow.fetches
        self._loads = loads
        self._counters = counters
        self._since: dict[str, float] = {}
        """When each request was first held back."""
        self._late: set[str] = set()

    def begin(self, tracked: TrackedRequest) -> None:
        """Start to bring what lies on disk of the request, from block `tracked.first` on.

        Where the host had no room for all of it, as many others wait, it may have by now. Before it
        is known what is there, only the first blocks of it might be found.
        """
        request_id = tracked.request.request_id
        fetch = self._fetches.of(request_id)
        begun = fetch is not None and not fetch.short
        can_read = self._overflow.known and not self._overflow.reading_off
        if begun or not can_read or request_id in self._late:
            return
        keys, parents = self._loads.beyond_host(tracked, self._overflow)
        if keys:
            self._fetches.begin(request_id, keys, parents)
            self._loads.look(tracked)  # others have left the host to make room

    def holds_back(self, tracked: TrackedRequest) -> bool:
        """Whether the request had better be asked about again in a later step."""
        request_id = tracked.request.request_id
        if request_id in self._late:
            return False
        if self._overflow.known:
            self.begin(tracked)
            fetch = self._fetches.of(request_id)
            if fetch is None or not fetch.under_way:
                return False
        now = time.monotonic()
        if now - self._since.setdefault(request_id, now) < self._deadline_s:
            return True
        self._late.add(request_id)
        self._counters.disk_late_reads += 1
        return False

    def end(self, request_id: str) -> int:
        """The request has what it can have, or is gone; returns how many blocks came from disk."""
        fetch = self._fetches.of(request_id)
        self._fetches.release(request_id)
        self._since.pop(request_id, None)
        self._late.discard(request_id)
        return fetch.arrived if fetch is not None else 0
