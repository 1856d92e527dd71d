"""Hit for hit what libCacheSim does; where its definition is another one, told and followed here.

It is written in C, by the authors of S3-FIFO and SIEVE: `pip install 'kvortex[agreement]'`.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from kvortex.policies import ARC, FIFO, LFU, LRU, S3FIFO, Sieve
from kvortex.simulator import replay
from kvortex.trace import Request, Trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvortex.policies import EvictionPolicy

libcachesim = pytest.importorskip("libcachesim", reason="pip install 'kvortex[agreement]'")

NEVER = 1 << 62


class LFUWithoutAgeing(LFU):
    """Theirs lets nothing age. (Their LFU-DA does, but in version 0.3.5 it did not return.)"""

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        victim = super().evict(pinned)
        self._age = 0
        return victim


class S3FIFOTheirWay(S3FIFO):
    """Theirs fills the main queue once the small one is full, until the first eviction; and looks
    for a ghost before it makes room. The paper makes room first, which may cost that very ghost.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._filling = True
        self._returns = False

    def expect(self, key: bytes) -> None:
        self._returns = key in self._ghosts
        self._ghosts.pop(key, None)

    def insert(self, key: bytes) -> None:
        over = self._filling and len(self._small) >= self._small_size
        (self._main if self._returns or over else self._small)[key] = 0

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        self._filling = False
        return super().evict(pinned)


OURS: dict[str, type[EvictionPolicy]] = {
    "ARC": ARC,
    "FIFO": FIFO,
    "LFU": LFUWithoutAgeing,
    "LRU": LRU,
    "S3FIFO": S3FIFOTheirWay,
    "Sieve": Sieve,
}
"""By their names. Not compared: MQ and W-TinyLFU, whose parameters differ."""


def sequence(seed: int, capacity: int) -> list[int]:
    """Skewed and even draws, with a scan and a loop in the middle."""
    draw = random.Random(seed)
    skewed = [int(draw.paretovariate(0.6)) % 2000 for _ in range(7000)]
    even = [draw.randrange(4 * capacity) for _ in range(3000)]
    mixed = [*skewed, *even]
    draw.shuffle(mixed)
    scan = list(range(10_000, 10_000 + 2 * capacity))
    loop = list(range(20_000, 20_000 + capacity + 1)) * 4
    return [*mixed[:5000], *scan, *loop, *mixed[5000:]]


def our_hits(policy: EvictionPolicy, accesses: list[int]) -> list[bool]:
    """A full pool, as a tier drives it."""
    resident, hits = set[bytes](), []
    for number in accesses:
        key = number.to_bytes(4, "big")
        hits.append(key in resident)
        if key in resident:
            policy.hit(key)
            continue
        policy.expect(key)
        if len(resident) == policy.capacity:
            victim = policy.evict(lambda _: False)
            assert victim is not None
            resident.remove(victim)
        policy.insert(key)
        resident.add(key)
    return hits


def their_hits(name: str, capacity: int, accesses: list[int]) -> list[bool]:
    cache, again, following = getattr(libcachesim, name)(capacity), dict[int, int](), list[int]()
    for now in range(len(accesses) - 1, -1, -1):
        following.append(again.get(accesses[now], NEVER))
        again[accesses[now]] = now
    following.reverse()
    return [
        bool(cache.get(libcachesim.Request(obj_id=key + 1, next_access_vtime=when)))
        for key, when in zip(accesses, following, strict=True)
    ]


@pytest.mark.parametrize("capacity", [20, 50, 200])
@pytest.mark.parametrize("name", OURS)
def test_every_hit_is_the_same(name: str, capacity: int) -> None:
    for seed in range(3):
        accesses = sequence(seed, capacity)
        ours = our_hits(OURS[name](capacity), accesses)
        assert ours == their_hits(name, capacity, accesses)
        assert 0 < sum(ours) < len(ours)


@pytest.mark.parametrize("capacity", [20, 50, 200])
def test_the_bound_is_beladys_with_one_slot_to_pass_through(capacity: int) -> None:
    """Belady's must store what it reads, ours need not: theirs has at least what ours has with a
    slot less, and at most what ours has with as many."""
    accesses = sequence(0, capacity)
    trace = Trace([Request((number.to_bytes(4, "big"),), 1) for number in accesses], 1)

    def bound(blocks: int) -> int:
        return replay(trace, "clairvoyant", blocks).hit_tokens

    belady = sum(their_hits("Belady", capacity, accesses))
    assert bound(capacity - 1) <= belady <= bound(capacity)
    assert belady > sum(our_hits(LRU(capacity), accesses))
