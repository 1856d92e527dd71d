"""Replays a trace through the tier and a policy, as the connector would drive them."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kvortex.core import ConfigError
from kvortex.plugins import load_admission, load_policy
from kvortex.policies import Place
from kvortex.tiers import HostTier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvortex.core import BlockKey
    from kvortex.trace import Request, Trace

CLAIRVOYANT = "clairvoyant"
"""Not a policy, but the bound: it knows when each block is asked for next."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy did with a trace at one size, or with two tiers of two sizes."""

    policy: str
    admission: str
    capacity_blocks: int
    capacity_share: float
    """Of the distinct blocks of the trace."""
    block_hit_rate: float
    token_hit_rate: float
    blocks_written: int
    hit_tokens: int
    disk_blocks: int
    """Capacity of the second tier."""
    disk_hit_rate: float
    """The part of `block_hit_rate` that came from there."""
    disk_blocks_written: int

    def as_dict(self) -> dict[str, str | int | float]:
        """Name to value."""
        return asdict(self)


def replay(
    trace: Trace, policy: str, capacity: int, admission: str = "always", disk_blocks: int = 0
) -> Outcome:
    """Look each request up, then touch or store its blocks, the last first.

    A hit counts only while the chain from the request's start is unbroken.

    Args:
        trace: its requests, in order.
        policy: a registered name, or CLAIRVOYANT; of both tiers.
        capacity: of the host pool, in blocks.
        admission: name of a filter, which stands before both tiers.
        disk_blocks: of a second tier.

    Raises:
        ConfigError: the policy raises, or breaks its word.
    """
    bound = policy == CLAIRVOYANT
    pool: _Clairvoyant | _Tiers
    if bound:
        pool = _Clairvoyant(trace.requests, capacity + disk_blocks)
    else:
        pool = _Tiers(policy, capacity, admission, disk_blocks)
    blocks = hit_blocks = tokens = hit_tokens = disk_hits = 0
    for request in trace.requests:
        keys = request.keys
        hits = next((i for i, key in enumerate(keys) if key not in pool), len(keys))
        disk_hits += pool.only_on_disk(keys[:hits])
        pool.use(keys)
        blocks += len(keys)
        hit_blocks += hits
        tokens += request.tokens
        hit_tokens += min(hits * trace.block_tokens, request.tokens)
    if pool.policy_error is not None:
        raise ConfigError(f"policy {policy!r} fails, LRU would serve instead: {pool.policy_error}")
    return Outcome(
        policy=policy,
        admission="" if bound else admission,
        capacity_blocks=capacity,
        capacity_share=round(capacity / trace.distinct_blocks(), 6),
        block_hit_rate=round(hit_blocks / max(1, blocks), 6),
        token_hit_rate=round(hit_tokens / max(1, tokens), 6),
        blocks_written=pool.written,
        hit_tokens=hit_tokens,
        disk_blocks=disk_blocks,
        disk_hit_rate=round(disk_hits / max(1, blocks), 6),
        disk_blocks_written=pool.disk_written,
    )


class _Tiers:
    """The connector's own tier with one policy, and one on disk by the rules of `Overflow`.

    Blocks are written to disk as they come to the host, or are used there, if admission wants them;
    what is read from disk enters the host again and stays on disk as well.
    """

    def __init__(self, policy: str, capacity: int, admission: str, disk_blocks: int) -> None:
        self.written = self.disk_written = 0
        self._host = self._tier(policy, capacity, admission)
        self._disk = self._tier(policy, disk_blocks, admission) if disk_blocks else None

    def __contains__(self, key: BlockKey) -> bool:
        return self._host.lookup(key) is not None or self._on_disk(key)

    @property
    def policy_error(self) -> str | None:
        """Why the policy was given up, if it was."""
        on_disk = self._disk.policy_error if self._disk is not None else None
        return self._host.policy_error or on_disk

    def only_on_disk(self, keys: Sequence[BlockKey]) -> int:
        """How many of these are not in the host."""
        return sum(self._host.lookup(key) is None for key in keys) if self._disk else 0

    def use(self, keys: Sequence[BlockKey]) -> None:
        length = len(keys)
        for position in range(length - 1, -1, -1):
            key, place = keys[position], Place(position, length)
            parent = keys[position - 1] if position else None
            if self._host.lookup(key) is not None:
                self._host.touch((key,))
            elif self._host.admits(key, place) or self._on_disk(key):
                self.written += _store(self._host, key, parent)
            else:
                continue
            if self._disk is not None:
                self._overflow(self._disk, key, place, parent)

    def _overflow(
        self, disk: HostTier, key: BlockKey, place: Place, parent: BlockKey | None
    ) -> None:
        if self._on_disk(key):
            disk.touch((key,))
        elif disk.admits(key, place):
            self.disk_written += _store(disk, key, parent)

    def _on_disk(self, key: BlockKey) -> bool:
        return self._disk is not None and self._disk.lookup(key) is not None

    @staticmethod
    def _tier(policy: str, capacity: int, admission: str) -> HostTier:
        filters = load_admission(admission, capacity)
        return HostTier(capacity, load_policy(policy, capacity), filters)


def _store(tier: HostTier, key: BlockKey, parent: BlockKey | None) -> int:
    blocks = tier.reserve((key,), (parent,))
    tier.commit(blocks)
    return len(blocks)


class _Clairvoyant:
    """Evicts what is asked for last, and does not store what would leave first itself.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
    """

    policy_error: str | None = None

    def __init__(self, requests: Sequence[Request], capacity: int) -> None:
        self.written = self.disk_written = 0
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

    def only_on_disk(self, _keys: Sequence[BlockKey]) -> int:
        """The bound has one tier of both sizes."""
        return 0

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
