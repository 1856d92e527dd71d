"""Pace: when each block may be written, so that a drive is not worn out faster than allowed.

The worker keeps to it, on the model's thread; the scheduler side reckons with one of its own, so
that it hands over no sooner than a worker takes.
"""

from __future__ import annotations

import sys

from kvortex.core import ConfigError

BURST_S = 1.0
"""What was not written in so many seconds may be caught up with."""
LONGEST_WAIT_S = 2.0
"""A block that would wait longer, with its slot in host memory, is not written."""
LONGEST_BLOCK_S = 60.0
"""A limit by which one block takes longer is a mistake, of a unit maybe."""


class Pace:
    """Appointments at no more than `bytes_per_s`; None is no limit. For use from one thread."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0

    def appoint(self, size: int, now: float) -> float | None:
        """The second at which `size` bytes may be written; None if that is too far off."""
        if self._bytes_per_s is None:
            return now
        start = self._start(now)
        if start > now + LONGEST_WAIT_S:
            return None
        self._free_at = start + size / self._bytes_per_s
        return max(start, now)

    def room(self, size: int, now: float, ahead_s: float) -> int:
        """How many times `size` bytes would be written within `ahead_s` seconds, or begun."""
        if self._bytes_per_s is None or not size:
            return sys.maxsize
        left = now + ahead_s - self._start(now)
        return 0 if left < 0 else 1 + int(left * self._bytes_per_s / size)

    def hear(self, size: int, now: float) -> None:
        """Somebody else's Pace has appointed up to `size` bytes lately, maybe as late as now."""
        if self._bytes_per_s is not None:
            self._free_at = max(self._free_at, now - BURST_S + size / self._bytes_per_s)

    def _start(self, now: float) -> float:
        return max(self._free_at, now - BURST_S)


def require_pace(mb_per_s: float | None, block_bytes: int) -> None:
    """
    Args:
        mb_per_s: `disk_max_write_mb_s`.
        block_bytes: of a block, on all ranks.

    Raises:
        ConfigError: next to nothing would ever be written.
    """
    if mb_per_s is None or block_bytes <= mb_per_s * 1e6 * LONGEST_BLOCK_S:
        return
    least = block_bytes / LONGEST_BLOCK_S / 1e6
    raise ConfigError(
        f"disk_max_write_mb_s={mb_per_s:g}: one KV block has {block_bytes / 1e6:.3g} MB and would "
        f"take more than a minute; use at least disk_max_write_mb_s={least * 1.01:.3g}"
    )
