"""Replays a trace through the tier and a policy, as the connector would drive them."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kvortex.plugins import load_admission, load_policy
from kvortex.policies import Place
from kvortex.tiers import HostTier
from kvortex.trace import BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvortex.core import BlockKey
    from kvortex.trace import Request

CLAIRVOYANT = "clairvoyant"
"""Not a policy, but the bound: it knows when each block is asked for next."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy did with a trace at one size."""

    policy: str
    admission: str
    capacity_blocks: int
    capacity_share: float
    """Of the distinct blocks of the trace."""
    block_hit_rate: float
    token_hit_rate: float
    blocks_written: int
    hit_tokens: int

    def as_dict(self) -> dict[str, str | int | float]:
        """Name to value."""
        return asdict(self)


def distinct_blocks(requests: Sequence[Request]) -> int:
    """How many blocks a pool would need to keep them all."""
    return len({key for request in requests for key in request.keys})


def replay(
    requests: Sequence[Request], policy: str, capacity: int, admission: str = "always"
) -> Outcome:
    """Look each request up, then touch or store its blocks, the last first.

    A hit counts only while the chain from the request's start is unbroken.

    Args:
        requests: in order.
        policy: a registered name, or CLAIRVOYANT.
        capacity: of the pool, in blocks.
        admission: name of a filter.
    """
    bound = policy == CLAIRVOYANT
    pool = _Clairvoyant(requests, capacity) if bound else _Tier(policy, capacity, admission)
    blocks = hit_blocks = tokens = hit_tokens = 0
    for request in requests:
        keys = request.keys
        hits = next((i for i, key in enumerate(keys) if key not in pool), len(keys))
        pool.use(request.keys)
        blocks += len(request.keys)
        hit_blocks += hits
        tokens += request.tokens
        hit_tokens += min(hits * BLOCK_TOKENS, request.tokens)
    return Outcome(
        policy=policy,
        admission="" if bound else admission,
        capacity_blocks=capacity,
        capacity_share=round(capacity / distinct_blocks(requests), 6),
        block_hit_rate=round(hit_blocks / max(1, blocks), 6),
        token_hit_rate=round(hit_tokens / max(1, tokens), 6),
        blocks_written=pool.written,
        hit_tokens=hit_tokens,
    )


class _Tier:
    """The connector's own tier with one policy."""

    def __init__(self, policy: str, capacity: int, admission: str) -> None:
        self.written = 0
        self._tier = HostTier(
            capacity, load_policy(policy, capacity), load_admission(admission, capacity)
        )

    def __contains__(self, key: BlockKey) -> bool:
        return self._tier.lookup(key) is not None

    def use(self, keys: Sequence[BlockKey]) -> None:
        tier, length = self._tier, len(keys)
        for position in range(length - 1, -1, -1):
            key = keys[position]
            if key in self:
                tier.touch((key,))
            elif tier.admits(key, Place(position, length)):
                blocks = tier.reserve((key,), (keys[position - 1] if position else None,))
                tier.commit(blocks)
                self.written += len(blocks)


class _Clairvoyant:
    """Evicts what is asked for last, and does not store what would leave first itself.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
    """

    def __init__(self, requests: Sequence[Request], capacity: int) -> None:
        self.written = 0
        self._capacity = capacity
        self._uses: defaultdict[BlockKey, deque[int]] = defaultdict(deque)
        for number, request in enumerate(requests):
            for key in request.keys:
                self._uses[key].append(number)
        self._next: dict[BlockKey, int] = {}
        self._farthest: list[tuple[int, int, BlockKey]] = []
        self._never = len(requests)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._next

    def use(self, keys: Sequence[BlockKey]) -> None:
        for position in range(len(keys) - 1, -1, -1):
            key = keys[position]
            uses = self._uses[key]
            uses.popleft()
            again = uses[0] if uses else self._never
            if key not in self._next:
                if again == self._never:
                    continue
                self.written += 1
            self._next[key] = again
            heapq.heappush(self._farthest, (-again, -position, key))
            while len(self._next) > self._capacity:
                self._evict()

    def _evict(self) -> None:
        """Of equals the tail; entries of the heap that later ones replaced are passed over."""
        when, _, key = heapq.heappop(self._farthest)
        if self._next.get(key) == -when:
            del self._next[key]
