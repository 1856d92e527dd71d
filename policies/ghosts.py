"""Ghosts: a number remembered for each of the last keys that left, in 13 bytes a key."""

from __future__ import annotations

from array import array
from zlib import crc32

WAYS = 8
"""Keys that share a place; the one remembered for longest makes room for the next."""
SPARE = 3
"""Times as many ways as keys, as keys fall unevenly: so one in 200 is lost. More must not be: a
prompt of which one block is forgotten is as good as forgotten from there on."""
MOST_KEYS = 1 << 22
"""That are remembered, however large the pool: 53 MB."""
SPREAD = 0x9E3779B1
"""2^32 over the golden ratio: keys whose checksums are neighbours share no place."""
TAGS, NUMBER, COUNT = (1 << 16) - 1, (1 << 8) - 1, (1 << 32) - 1
HAND, WIDTH = 2 * WAYS, 2 * WAYS + 1
"""Of a place in the table: where its hand is, and its numbers."""
TICKS, ROUND = 16, 1 << 8
"""In so many ticks a key grows too old, and after so many the clock begins anew; by then others
have been written over it."""


class Ghosts:
    """Remembers about the last `count` keys, each with a number from 0 to 255.

    A key is known by its place and 16 bits more of its checksum: one stranger in 20 000, or in 1000
    where millions are remembered, is taken for another key, which costs a wrong guess and nothing
    else. The keys themselves are not kept. O(1).
    """

    def __init__(self, count: int) -> None:
        count = min(count, MOST_KEYS)
        self._places = max(1, -(-SPARE * count // WAYS))
        self._table = array("H", bytes(2 * WIDTH * self._places))
        """Of each place the tags of its keys, 0 for none; then the tick at which each was put, and
        below that its number; then the hand, at the way written longest ago. Side by side, because
        in a large table each is a miss of the processor's cache."""
        self._per_tick = max(1, -(-count // TICKS))
        self._ticks_kept = count // self._per_tick
        self._tick = self._puts = 0
        self._empty = True

    def put(self, key: bytes, number: int) -> None:
        """Remember a key that is not remembered; larger numbers count as 255."""
        self._empty = False
        table = self._table
        first, tag = self._find(key)
        way = table[first + HAND]
        table[first + HAND] = (way + 1) % WAYS
        table[first + way] = tag
        table[first + WAYS + way] = self._tick << 8 | min(NUMBER, number)
        self._puts += 1
        if self._puts == self._per_tick:
            self._puts, self._tick = 0, (self._tick + 1) % ROUND

    def pop(self, key: bytes) -> int | None:
        """Forget a key; its number, or None if it is not remembered."""
        if self._empty:  # as while a tier adopts what was left to it
            return None
        table = self._table
        first, tag = self._find(key)
        tags = table[first : first + WAYS]
        if tag not in tags:
            return None
        at = first + tags.index(tag)
        table[at] = 0
        tick, number = divmod(table[at + WAYS], NUMBER + 1)
        return number if (self._tick - tick) % ROUND <= self._ticks_kept else None

    def _find(self, key: bytes) -> tuple[int, int]:
        """Where a key's place begins, and what it is known by there."""
        mixed = crc32(key) * SPREAD & COUNT
        return (mixed * self._places >> 32) * WIDTH, mixed % TAGS + 1
