"""LoadPlanner: how much of a prompt is loaded, and whether its request waits for it apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvortex.prefix_match import longest_prefix

if TYPE_CHECKING:
    from collections.abc import Container

    from kvortex.config import KVortexConfig
    from kvortex.connector.geometry import Geometry
    from kvortex.connector.tracked_request import TrackedRequest
    from kvortex.connector.turns import Turns
    from kvortex.core import BlockKey, Job
    from kvortex.cost_model import CostModel
    from kvortex.overflow import Overflow
    from kvortex.prefix_match import Reach


class LoadPlanner:
    """Decides by what is readable, what it costs, and what else is being loaded.

    Loads are measured in tokens of all KV cache groups: of windows, only what they see is loaded.

    Args:
        config: of the connector.
        geometry: of the KV cache.
        readable: keys of the blocks that can be loaded.
        costs: of loading and of computing.
        turns: which knows whether others run.
    """

    def __init__(
        self,
        config: KVortexConfig,
        geometry: Geometry,
        readable: Container[BlockKey],
        costs: CostModel,
        turns: Turns,
    ) -> None:
        self._config = config
        self._reaches = geometry.reaches
        self._always_apart = not geometry.names_failed_blocks
        self._block_tokens = geometry.block_tokens
        self._readable = readable
        self._costs = costs
        self._turns = turns
        self._under_way = 0.0
        self._awaited = 0.0

    def look(self, tracked: TrackedRequest) -> None:
        """Find how far the host can restore a request, for what is asked of it next."""
        keys = self._wanted(tracked)
        tracked.in_host = longest_prefix(
            self._readable, keys, self._reaches, tracked.first, self._block_tokens
        )

    def choose(self, tracked: TrackedRequest) -> int:
        """Tokens to load after the blocks that are on the GPU; it notes why, and how."""
        end = tracked.in_host
        num_tokens = (end - tracked.first) * self._block_tokens
        starts = (self._start(reach, tracked.first, end) for reach in self._reaches)
        loaded = self.tokens(sum(end - start for start in starts))
        pays = num_tokens > 0 and self._pays(num_tokens, loaded)
        tracked.unpaid = 0 if pays else num_tokens
        tracked.apart = pays and self._waits_apart(loaded)
        return num_tokens if pays else 0

    def beyond_host(
        self, tracked: TrackedRequest, overflow: Overflow
    ) -> tuple[list[BlockKey], list[BlockKey | None]]:
        """What a request needs of both tiers, if it pays to read more than the host has.

        Returns the keys, and the key before each where it is of no use without that.
        """
        tracked.unfetched = 0
        end = longest_prefix(
            overflow.readable,
            self._wanted(tracked),
            self._reaches,
            tracked.first,
            self._block_tokens,
            tracked.in_host,
        )
        if end == tracked.in_host:
            return [], []
        more = (end - tracked.in_host) * self._block_tokens
        keys: list[BlockKey] = []
        parents: list[BlockKey | None] = []
        for group, reach in enumerate(self._reaches):
            start = self._start(reach, tracked.first, end)
            of_group = tracked.keys(group, start, end)
            keys += of_group
            parents += tracked.parents(group, start, end) if reach.whole else [None] * len(of_group)
        on_disk = sum(key not in self._readable for key in keys)
        if self._pays(more, self.tokens(on_disk), overflow.fetches.seconds(on_disk)):
            return keys, parents
        tracked.unfetched = more
        return [], []

    def blocks(self, tracked: TrackedRequest, num_tokens: int) -> tuple[list[BlockKey], list[int]]:
        """What every group needs of so many tokens, by key, and the GPU blocks for it."""
        first, end = tracked.first, tracked.first + num_tokens // self._block_tokens
        keys: list[BlockKey] = []
        block_ids: list[int] = []
        for group, reach in enumerate(self._reaches):
            start = self._start(reach, first, end)
            keys += tracked.keys(group, start, end)
            block_ids += tracked.block_ids[group][start:end]
        return keys, block_ids

    def began(self, job: Job) -> None:
        """A load was planned."""
        tokens = self.tokens(len(job.block_ids))
        self._under_way += tokens
        if job.request_id is None:
            self._awaited += tokens

    def ended(self, job: Job) -> None:
        """Every rank is done with a load."""
        self._under_way -= self.tokens(len(job.block_ids))

    def tokens(self, num_blocks: int) -> float:
        """So many blocks of any groups, in tokens of all groups."""
        return num_blocks * self._block_tokens / len(self._reaches)

    def take_awaited(self) -> float:
        """Tokens for which the next step waits."""
        awaited, self._awaited = self._awaited, 0.0
        return awaited

    def _pays(self, num_tokens: int, loaded: float, read_seconds: float = 0) -> bool:
        if num_tokens < self._config.min_load_tokens:
            return False
        if self._config.load == "always":
            return True
        return self._costs.pays(num_tokens, loaded, self._under_way, read_seconds)

    def _wanted(self, tracked: TrackedRequest) -> list[list[BlockKey]]:
        """Of each group, the keys of the blocks that may be loaded."""
        last = tracked.most_loaded(tracked.request.num_tokens - 1) // self._block_tokens
        return [tracked.keys(group, tracked.first, last) for group in range(len(self._reaches))]

    def _waits_apart(self, loaded: float) -> bool:
        """Whether others would be held up by a step that waits for this load."""
        return self._always_apart or (self._turns.running > 0 and self._costs.pauses(loaded))

    def _start(self, reach: Reach, first: int, end: int) -> int:
        """The first block, from `first` on, that a group looks at behind block `end`."""
        return max(first, reach.first_token(end * self._block_tokens) // self._block_tokens)
