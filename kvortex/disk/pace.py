"""Pace: when each block may be written, so that a drive is not worn out faster than allowed."""

from __future__ import annotations

BURST_S = 1.0
"""What was not written in so many seconds may be caught up with."""
LONGEST_WAIT_S = 2.0
"""A block that would wait longer, with its slot in host memory, is not written."""


class Pace:
    """Appointments at no more than `bytes_per_s`; None is no limit. For use from one thread."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0

    def appoint(self, size: int, now: float) -> float | None:
        """The second at which `size` bytes may be written; None if that is too far off."""
        if self._bytes_per_s is None:
            return now
        start = max(self._free_at, now - BURST_S)
        if start > now + LONGEST_WAIT_S:
            return None
        self._free_at = start + size / self._bytes_per_s
        return max(start, now)
