"""Speedometer: how fast copies of one direction were of late. Worker side, one thread."""

from __future__ import annotations

import time

LEAST_BYTES = 32 << 20
"""Smaller copies tell of launches and of the ends of copies, not of the link."""
KEPT = 0.8
"""What a measure leaves of the weight of those before it."""
FRESH_S = 60.0
"""A load that seems not to pay is not tried, and so never measured again: what was measured longer
ago is forgotten, or a link that was slow once would be slow for ever."""


class Speedometer:
    """Bytes over busy seconds, of which the newer ones count more.

    Sums of both are kept, not a mean of speeds: copies that overlap share their seconds.
    """

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0
        self._first: float | None = None
        self._noted_at = 0.0

    @property
    def bytes_per_s(self) -> float | None:
        """What was measured of late; else what was first of all, while nothing else ran."""
        return self._bytes / self._seconds if self._seconds and self._is_fresh() else self._first

    def note(self, nbytes: int, seconds: float) -> None:
        """So many bytes took so long, in which they may have had to share the link."""
        kept = KEPT if self._is_fresh() else 0.0
        self._bytes = kept * self._bytes + nbytes
        self._seconds = kept * self._seconds + seconds
        self._noted_at = time.monotonic()
        if self._first is None and self._seconds:
            self._first = self._bytes / self._seconds

    def _is_fresh(self) -> bool:
        return time.monotonic() - self._noted_at < FRESH_S
