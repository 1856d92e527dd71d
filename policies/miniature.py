"""Miniature: a pool in small over a sample of the keys, to see what another rule would have hit."""

from __future__ import annotations

from zlib import crc32

from .lru_freq import LRUFreq

MOST_BLOCKS = 1024
"""Of a miniature; a pool that is larger is simulated with as small a share of its keys."""
SPREAD = 1 << 24


class Sample:
    """Which keys a miniature of a pool sees, and how many blocks it has for them."""

    def __init__(self, capacity: int) -> None:
        self.blocks = max(1, min(capacity, MOST_BLOCKS))
        self._below = SPREAD * self.blocks // max(1, capacity)

    def __contains__(self, key: bytes) -> bool:
        return crc32(key) >> 8 < self._below


class Miniature:
    """Blocks ranked by `lru_freq`, whose hits are counted.

    Source: Waldspurger, Saemundsson, Ahmad, Park, "Cache modeling and optimization using miniature
    simulations", USENIX ATC 2017.
    """

    def __init__(self, capacity: int) -> None:
        self.hits = 0.0
        self._policy = LRUFreq(capacity)
        self._resident: set[bytes] = set()

    def access(self, key: bytes, admitted: bool) -> None:
        """A request asked for the key; if it is not here, the rule says whether it enters."""
        policy, resident = self._policy, self._resident
        if key in resident:
            self.hits += 1
            policy.hit(key)
            return
        if len(resident) == policy.capacity:
            if not admitted:
                return
            victim = policy.evict(_none_pinned)
            assert victim is not None
            resident.remove(victim)
        resident.add(key)
        policy.insert(key)


def _none_pinned(_key: bytes) -> bool:
    return False
