"""SchedulerSide: turns what vLLM schedules into loads and stores of (key, block) pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from kvortex.connector.messages import ReportMessage
from kvortex.core import Direction, StepPlan
from kvortex.engine import slots_in_pool
from kvortex.plugins import load_admission, load_policy
from kvortex.policies import Place
from kvortex.scheduler import OffloadScheduler
from kvortex.tiers import HostTier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvortex.config import KVortexConfig
    from kvortex.connector.geometry import Geometry
    from kvortex.core import BlockKey

GROUP = 0
FAILED_STATUS = "FINISHED_ERROR"


@dataclass(slots=True)
class _Tracked:
    """A request that vLLM runs: its GPU blocks and how many of them were considered for storing."""

    request: Request
    block_ids: list[int] = field(default_factory=list)
    considered: int = 0
    stale: bool = False
    """Its bytes were computed before a reset; nothing of it may be stored."""


class SchedulerSide:
    """One per vLLM scheduler; called on its thread only.

    Source blocks of a store get a reference in vLLM's block pool, so that they are not given to
    another request before every rank reported the store.
    """

    def __init__(self, config: KVortexConfig, geometry: Geometry) -> None:
        num_slots = slots_in_pool(config, geometry.slot_bytes, geometry.num_ranks)
        tier = HostTier(
            num_slots,
            load_policy(config.eviction_policy, num_slots),
            load_admission(config.admission, num_slots),
        )
        self.offload = OffloadScheduler(tier, geometry.num_ranks)
        self._block_tokens = geometry.block_tokens
        self._pool: BlockPool | None = None
        self._tracked: dict[str, _Tracked] = {}
        self._first_missing: dict[str, int] = {}
        self._held: dict[int, list[KVCacheBlock]] = {}

    def bind_gpu_block_pool(self, pool: BlockPool) -> None:
        """Before this nothing is stored."""
        self._pool = pool

    @property
    def frees_blocks(self) -> bool:
        """Whether a store under way is the last holder of a GPU block."""
        return any(block.ref_cnt == 1 for held in self._held.values() for block in held)

    def match(self, request: Request, num_computed_tokens: int) -> int:
        """Tokens after the computed ones that can be loaded: whole blocks, one token left over."""
        if request.skip_reading_prefix_cache or num_computed_tokens % self._block_tokens:
            return 0
        first = num_computed_tokens // self._block_tokens
        keys = self._keys(request, first, (request.num_tokens - 1) // self._block_tokens)
        self._first_missing[request.request_id] = first
        return self.offload.match(keys) * self._block_tokens

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """vLLM gave the request its blocks, and runs it in this step."""
        first = self._first_missing.pop(request.request_id, 0)
        block_ids = list(blocks.get_block_ids()[GROUP])
        self._tracked[request.request_id] = _Tracked(request, block_ids)
        if request.num_preemptions == 0:  # a resumed request is not a second use
            last = request.num_tokens // self._block_tokens
            self.offload.tier.touch(self._keys(request, 0, last))
        if num_external_tokens:
            last = first + num_external_tokens // self._block_tokens
            self.offload.load(self._keys(request, first, last), block_ids[first:last])

    def plan(self, output: SchedulerOutput) -> StepPlan:
        """Plan to store every block that this step completes."""
        pairs = [
            pair
            for tracked, num_tokens in self._advance(output)
            for pair in self._completed(tracked, num_tokens)
        ]
        self._store(pairs)
        return self.offload.take_plan(has_forward=output.total_num_scheduled_tokens > 0)

    def finished(self, request: Request) -> None:
        """Store what only its last tokens completed, before vLLM frees the blocks."""
        self._first_missing.pop(request.request_id, None)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None and request.status.name != FAILED_STATUS:
            self._store(list(self._completed(tracked, request.num_computed_tokens)))

    def settle(self, output: KVConnectorOutput) -> None:
        """Take in the workers' report of a step."""
        message = output.kv_connector_worker_meta
        if not isinstance(message, ReportMessage):
            return
        for flight in self.offload.settle(message.report):
            if flight.direction is Direction.STORE:
                self._release(flight.job.id)
            elif flight.failed:  # recomputed blocks are to be stored like new ones
                for tracked in self._tracked.values():
                    tracked.considered = 0

    def reset(self) -> None:
        """Forget everything, and store nothing more of what was computed before."""
        self.offload.reset()
        for tracked in self._tracked.values():
            tracked.stale = True

    def _advance(self, output: SchedulerOutput) -> Iterator[tuple[_Tracked, int]]:
        """Each scheduled request with the number of its tokens computed after this step."""
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            tracked = self._tracked.get(new.req_id)
            if tracked is not None:
                tracked.block_ids = list(new.block_ids[GROUP])
                yield tracked, new.num_computed_tokens + scheduled[new.req_id]
        cached = output.scheduled_cached_reqs
        rows = zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
        for request_id, block_ids, num_computed in rows:
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            if request_id in cached.resumed_req_ids:
                tracked.block_ids = []
            if block_ids is not None:
                tracked.block_ids += block_ids[GROUP]
            yield tracked, num_computed + scheduled[request_id]

    def _completed(self, tracked: _Tracked, num_tokens: int) -> Iterator[tuple[BlockKey, int]]:
        """Blocks full of computed tokens that were not considered yet and are worth storing.

        A block has a hash only if all of its tokens are known, so drafts never complete one.
        """
        first = tracked.considered
        hashes = tracked.request.block_hashes
        last = min(num_tokens // self._block_tokens, len(hashes), len(tracked.block_ids))
        tracked.considered = max(first, last)
        if tracked.stale or self._pool is None:
            return
        keys, length = self._keys(tracked.request, first, last), len(hashes)
        for position, key in enumerate(keys, first):
            block_id = tracked.block_ids[position]
            if self._pool.blocks[block_id].is_null or not self.offload.wants(key):
                continue
            if self.offload.admits(key, Place(position, length)):
                yield key, block_id

    def _store(self, pairs: list[tuple[BlockKey, int]]) -> None:
        unique = dict(pairs)  # two requests of one step may have computed the same block
        if not unique or self._pool is None:
            return
        job = self.offload.store(list(unique), list(unique.values()))
        if job is not None:
            held = [self._pool.blocks[block_id] for block_id in job.block_ids.tolist()]
            self._pool.touch(held)
            self._held[job.id] = held

    def _release(self, job_id: int) -> None:
        held = self._held.pop(job_id, None)
        if held is not None and self._pool is not None:
            self._pool.free_blocks(reversed(held))

    def _keys(self, request: Request, first: int, last: int) -> list[BlockKey]:
        hashes = request.block_hashes[first:last]
        return [make_block_hash_with_group_id(block_hash, GROUP) for block_hash in hashes]
