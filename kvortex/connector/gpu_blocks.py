"""GpuBlocks: what the scheduler side asks of vLLM's block pool, and the blocks it holds there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

    from kvortex.core import Job


class GpuBlocks:
    """Source blocks of a store get a reference in the pool.

    So they are not given to another request before every rank reported the store.
    """

    def __init__(self) -> None:
        self._pool: BlockPool | None = None
        self._held: dict[int, list[KVCacheBlock]] = {}

    def bind(self, pool: BlockPool) -> None:
        """Before this nothing is known to be cached, and nothing can be held."""
        self._pool = pool

    @property
    def frees_any(self) -> bool:
        """Whether a store under way is the last holder of a block."""
        return any(block.ref_cnt == 1 for held in self._held.values() for block in held)

    def count_cached(self, hashes: Sequence[BlockHash], num_groups: int) -> int:
        """Leading blocks that vLLM will find in its own prefix cache, as things stand."""
        groups = list(range(num_groups))
        for number, block_hash in enumerate(hashes):
            if self._pool is None or self._pool.get_cached_block(block_hash, groups) is None:
                return number
        return len(hashes)

    def can_hold(self, block_id: int) -> bool:
        """Whether it is a block: the null block stands for those that are not needed any more."""
        return self._pool is not None and not self._pool.blocks[block_id].is_null

    def hold(self, job: Job) -> None:
        """Keep what a store reads as it is, until it is released."""
        assert self._pool is not None
        held = [self._pool.blocks[block_id] for block_id in job.block_ids.tolist()]
        self._pool.touch(held)
        self._held[job.id] = held

    def release(self, job_id: int) -> None:
        """Every rank is done with a store."""
        held = self._held.pop(job_id, None)
        if held is not None and self._pool is not None:
            self._pool.free_blocks(reversed(held))

    def evict(self, block_ids: set[int]) -> None:
        """Have nobody find these blocks in vLLM's prefix cache any more."""
        if self._pool is not None:
            self._pool.evict_blocks(block_ids)
