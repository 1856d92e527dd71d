"""FrequencySketch: about how often keys were seen lately, in a few bytes for each block."""

from __future__ import annotations

from zlib import crc32

ROWS = 4
SPREAD = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: spreads 32 bits over 64. Unlike `hash`, the same in every process."""
MOST = 15
WIDTH = 4
"""Counters of a row for each block of the capacity, at least."""
SAMPLE = 10
"""After this many times the capacity of sightings every count is halved."""


class FrequencySketch:
    """A count-min sketch with conservative update and periodic halving.

    Source: Cormode, Muthukrishnan, 2005; halving as in TinyLFU.
    """

    def __init__(self, capacity: int) -> None:
        self._mask = (1 << (WIDTH * capacity).bit_length()) - 1
        self._rows = [bytearray(self._mask + 1) for _ in range(ROWS)]
        self._period = SAMPLE * max(1, capacity)
        self._seen = 0

    def add(self, key: bytes) -> None:
        """Count a sighting."""
        places = self._places(key)
        least = min(row[place] for row, place in zip(self._rows, places, strict=True))
        if least < MOST:
            for row, place in zip(self._rows, places, strict=True):
                if row[place] == least:
                    row[place] = least + 1
        self._seen += 1
        if self._seen >= self._period:
            self._seen //= 2
            halves = bytes(count >> 1 for count in range(256))
            self._rows = [row.translate(halves) for row in self._rows]

    def count(self, key: bytes) -> int:
        """An upper estimate of the sightings since they were last halved, at most 15."""
        places = self._places(key)
        return min(row[place] for row, place in zip(self._rows, places, strict=True))

    def _places(self, key: bytes) -> list[int]:
        seed = crc32(key) * SPREAD
        return [(seed >> (11 * row)) & self._mask for row in range(ROWS)]
