"""StorePlanner: which of the blocks that steps complete are stored. Scheduler side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvortex.policies import Place

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvortex.connector.geometry import Geometry
    from kvortex.connector.gpu_blocks import GpuBlocks
    from kvortex.connector.tracked_request import TrackedRequest
    from kvortex.connector.tracked_requests import Row
    from kvortex.core import BlockKey, Job
    from kvortex.scheduler import OffloadScheduler

    Found = tuple[BlockKey, int, BlockKey | None]
    """A block's key, the block, and the key before it, without which it is of no use."""


class StorePlanner:
    """Considers each block of a request once, when all of its tokens are computed.

    Args:
        offload: which says what is worth storing, and plans it.
        gpu: where blocks are held while they are stored.
        geometry: of the KV cache.
    """

    def __init__(self, offload: OffloadScheduler, gpu: GpuBlocks, geometry: Geometry) -> None:
        self._offload = offload
        self._gpu = gpu
        self._reaches = geometry.reaches
        self._block_tokens = geometry.block_tokens

    def store(self, rows: Iterable[Row]) -> None:
        """Plan to store every block that a step completes, two requests' common ones once."""
        found = {
            block[0]: block
            for tracked, _, before, after in rows
            for block in self._completed(tracked, before, after)
        }
        if not found:
            return
        keys, block_ids, parents = zip(*found.values(), strict=True)
        job = self._offload.store(keys, block_ids, parents)
        if job is not None:
            self._gpu.hold(job)

    def ended(self, job: Job) -> None:
        """Every rank is done with a store."""
        self._gpu.release(job.id)

    def rewind(self, requests: Iterable[TrackedRequest]) -> None:
        """A load failed: what vLLM computes once more is to be stored like new, and only that."""
        for tracked in requests:
            computed = tracked.request.num_computed_tokens // self._block_tokens
            tracked.considered = min(tracked.considered, computed)

    def _completed(self, tracked: TrackedRequest, before: int, after: int) -> Iterator[Found]:
        """Blocks full of computed tokens that were not considered yet and are worth storing.

        A block has a hash only if all of its tokens are known, so drafts never complete one. What
        lies behind the window of the tokens computed `before` belongs to others by now; of a
        window, the blocks before one may be gone.
        """
        size, length = self._block_tokens, len(tracked.request.block_hashes)
        first, last = tracked.considered, min(tracked.most_stored(after) // size, length)
        if last <= first:
            return
        tracked.considered = last
        if tracked.stale:
            return
        for group, (reach, block_ids) in enumerate(
            zip(self._reaches, tracked.block_ids, strict=True)
        ):
            start = max(first, reach.first_token(before) // size)
            keys = tracked.keys(group, start, last)
            parents = tracked.parents(group, start, last) if reach.whole else [None] * len(keys)
            places = range(start, last)
            rows = zip(places, keys, parents, block_ids[start:last], strict=False)
            for position, key, parent, block_id in rows:
                if not (self._gpu.can_hold(block_id) and self._offload.wants(key)):
                    continue
                if self._offload.admits(key, Place(position, length)):
                    yield key, block_id, parent
