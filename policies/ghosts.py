"""Ghosts: a number remembered for each of the last keys that left, in 24 bytes a key."""

from __future__ import annotations

from array import array
from zlib import crc32

WAYS = 8
"""Keys that share a place; the one remembered for longest makes room for the next."""
SPARE = 3
"""Times as many places as keys, as keys fall unevenly: so one in 200 is lost. More must not be: a
prompt of which one block is forgotten is as good as forgotten from there on."""
MOST_KEYS = 1 << 22
"""That are remembered, however large the pool: 100 MB."""
SPREAD = 0x9E3779B1
"""2^32 over the golden ratio: keys whose checksums are neighbours share no place."""
CHECKSUM, NUMBER, COUNT = (1 << 24) - 1, (1 << 8) - 1, (1 << 32) - 1


class Ghosts:
    """Remembers the last `count` keys, each with a number from 0 to 255; exact but for chance.

    A key is known by 24 bits of its checksum: one stranger in a million is taken for another key,
    which costs a wrong guess and nothing else. The keys themselves are not kept. O(1).
    """

    def __init__(self, count: int) -> None:
        count = min(count, MOST_KEYS)
        self._count = count
        self._puts = 0
        self._places = max(1, -(-SPARE * count // WAYS))
        self._entries = array("Q", bytes(8 * WAYS * self._places))
        """WAYS for each place, the newest first: when it was put, checksum + 1, number."""

    def put(self, key: bytes, number: int) -> None:
        """Remember a key that is not remembered; larger numbers count as 255."""
        first, checksum = self._place(key)
        entries = self._entries
        entries[first + 1 : first + WAYS] = entries[first : first + WAYS - 1]
        entries[first] = self._puts << 32 | checksum << 8 | min(NUMBER, number)
        self._puts = self._puts + 1 & COUNT

    def pop(self, key: bytes) -> int | None:
        """Forget a key; its number, or None if it is not remembered."""
        first, checksum = self._place(key)
        entries = self._entries
        for at in range(first, first + WAYS):
            entry = entries[at]
            if not entry or (self._puts - (entry >> 32)) & COUNT > self._count:
                return None  # and so are those behind it
            if entry >> 8 & CHECKSUM == checksum:
                entries[at : first + WAYS - 1] = entries[at + 1 : first + WAYS]
                entries[first + WAYS - 1] = 0
                return entry & NUMBER
        return None

    def _place(self, key: bytes) -> tuple[int, int]:
        """Where a key's entries begin, and what it is known by there."""
        checksum = crc32(key)
        place = (checksum * SPREAD & COUNT) * self._places >> 32
        return WAYS * place, checksum % CHECKSUM + 1
