"""ReuseDistance: how many accesses lie between two of one key, learned from a sample of keys."""

from __future__ import annotations

from collections import OrderedDict
from math import log2
from zlib import crc32

SAMPLE = 16
"""One key of so many is watched; of larger pools fewer, in proportion."""
LEAST_WATCHED, MOST_WATCHED = 1 << 12, 1 << 15
"""Keys, however small or large the pool."""
STEPS = 4
"""Histogram bins for each doubling of the distance."""
BINS = 40 * STEPS
FORGET_EVERY = 1024
"""Returns, after which what was learned counts half."""
LEARN_EVERY = 16
SHARE = 0.5
"""Of the first returns come within the distance that is reported."""
RETURNED = 0
"""Only a key's first return counts, or a prompt that all share would drown the others."""


class ReuseDistance:
    """`typical` is the distance within which half of the keys return that return at all.

    Watched keys are remembered for 16 times as many accesses as the pool holds blocks and longer,
    whether they stay in the pool or not: what a policy keeps must not decide what it learns.
    """

    def __init__(self, capacity: int) -> None:
        self.now = 0
        """Accesses so far."""
        self.typical = float(capacity)
        self._most = min(MOST_WATCHED, max(LEAST_WATCHED, capacity))
        self._sample = SAMPLE * max(1, capacity // MOST_WATCHED)
        self._last: OrderedDict[int, int] = OrderedDict()
        """A key's checksum to when it was asked for."""
        self._returns = [0.0] * BINS
        self._count = 0

    def access(self, key: bytes) -> None:
        """A request asked for the key."""
        self.now += 1
        checksum = crc32(key)
        if checksum % self._sample:
            return
        last = self._last.pop(checksum, None)
        if last:
            self._learn(self.now - last)
        self._last[checksum] = self.now if last is None else RETURNED
        if len(self._last) > self._most:
            self._last.popitem(last=False)

    def _learn(self, distance: int) -> None:
        self._returns[min(BINS - 1, int(log2(distance) * STEPS))] += 1
        self._count += 1
        if self._count % LEARN_EVERY == 0:
            left = SHARE * sum(self._returns)
            for step, returns in enumerate(self._returns):
                left -= returns
                if left <= 0:
                    self.typical = 2 ** ((step + 0.5) / STEPS)
                    break
        if self._count % FORGET_EVERY == 0:
            self._returns = [returns / 2 for returns in self._returns]
