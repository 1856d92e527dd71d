"""For authors of eviction policies: does mine keep the contract? Needs nothing but KVortex."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvortex.policies import EvictionPolicy

CAPACITIES = (1, 2, 7, 64)
STEPS = 4000


def check_policy(factory: Callable[[int], EvictionPolicy], seed: int = 0) -> None:
    """Drive a policy as a tier does, through bursts, loops, scans and pins, and check every answer.

    Args:
        factory: the class, or whatever is registered; called with a capacity in blocks.
        seed: of the steps; the same seed gives the same steps.

    Raises:
        AssertionError: the contract of `kvortex.policies.EvictionPolicy` is broken, or the policy
            raises; the message says how, and after how many steps.
    """
    for capacity in CAPACITIES:
        draw = random.Random(seed)
        tier = _Tier(_made(factory, capacity), capacity)
        for number in range(STEPS):
            tier.step = number
            tier.take(draw)
        tier.drain()


class _BrokenError(AssertionError):
    """A complaint of ours, not one of the policy's own."""


def _made(factory: Callable[[int], EvictionPolicy], capacity: int) -> EvictionPolicy:
    try:
        return factory(capacity)
    except Exception as error:
        name = getattr(factory, "__qualname__", repr(factory))
        raise _BrokenError(f"{name}({capacity}) raised {error!r}") from error


class _Tier:
    """A full pool in miniature, which knows what the policy must know."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self.step = 0
        self._policy = policy
        self._capacity = capacity
        self._resident: dict[bytes, None] = {}
        self._pinned: set[bytes] = set()

    def take(self, draw: random.Random) -> None:
        """One access: mostly of popular keys, sometimes of a scan; now and then something else."""
        popular = draw.random() < 0.6
        number = draw.randrange(2 * self._capacity) if popular else 1000 + self.step
        key = number.to_bytes(4, "big")
        chance = draw.random()
        if key in self._resident:
            if chance < 0.1 and key not in self._pinned:
                self._ask("remove", key)
                del self._resident[key]
            else:
                self._ask("hit", key)
        else:
            self._store(key)
        if chance > 0.9:
            self._pinned = {k for k in self._resident if draw.random() < 0.5}
        elif chance > 0.85:
            self._pinned = set(self._resident)
        elif chance > 0.7:
            self._pinned = set()

    def drain(self) -> None:
        """Without pins every key leaves, each once, and then there is none."""
        self._pinned = set()
        while self._resident:
            self._evict()
        self._require(self._ask("evict", self._is_pinned) is None, "evicted a key it had evicted")

    def _store(self, key: bytes) -> None:
        self._ask("expect", key)
        if len(self._resident) < self._capacity or self._evict():
            self._ask("insert", key)
            self._resident[key] = None

    def _evict(self) -> bool:
        left = len(self._resident.keys() - self._pinned)
        victim = self._ask("evict", self._is_pinned)
        if victim is None:
            self._require(left == 0, f"found no victim among {left} keys that are not pinned")
            return False
        self._require(victim in self._resident, f"evicted {victim!r}, which is not resident")
        self._require(victim not in self._pinned, f"evicted {victim!r}, which is pinned")
        del self._resident[victim]
        return True

    def _ask(self, verb: str, argument: object) -> bytes | None:
        try:
            answer: bytes | None = getattr(self._policy, verb)(argument)
        except _BrokenError:
            raise  # it asked for a key that it should not know
        except Exception as error:
            raise self._complaint(f"{verb} raised {error!r}") from error
        return answer

    def _is_pinned(self, key: bytes) -> bool:
        self._require(key in self._resident, f"asked for {key!r}, which is not resident")
        return key in self._pinned

    def _require(self, kept: bool, complaint: str) -> None:
        if not kept:
            raise self._complaint(complaint)

    def _complaint(self, what: str) -> _BrokenError:
        name = type(self._policy).__qualname__
        return _BrokenError(f"{name}({self._capacity}), step {self.step}: {what}")
