"""TrackedRequests: all that vLLM has, and how far each step takes them. Scheduler side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvortex.connector.tracked_request import TrackedRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from kvortex.connector.adapters import Adapters

    Row = tuple[TrackedRequest, list[list[int]], int, int]
    """A request, its GPU blocks by KV cache group then, and its first and last computed token."""


class TrackedRequests(dict[str, TrackedRequest]):
    """By their names; each is in from when vLLM first asks about it until it is finished.

    Args:
        num_groups: KV cache groups.
        adapters: whose weights are in keys, where keys outlive this process.
    """

    def __init__(self, num_groups: int, adapters: Adapters | None = None) -> None:
        super().__init__()
        self._num_groups = num_groups
        self._adapters = adapters

    def of(self, request: Request) -> TrackedRequest:
        """What is known of it; from now on it is tracked."""
        tracked = self.get(request.request_id)
        if tracked is None:
            mark = self._adapters.mark(request.lora_request) if self._adapters is not None else b""
            tracked = self[request.request_id] = TrackedRequest.of(request, mark)
        return tracked

    def advance(self, output: SchedulerOutput) -> list[Row]:
        """Take in what a step computes; a row for each request that is in it."""
        return [*self._begin(output), *self._go_on(output)]

    def _begin(self, output: SchedulerOutput) -> Iterator[Row]:
        """Those that are new to the model runner."""
        for new in output.scheduled_new_reqs:
            tracked = self.get(new.req_id)
            if tracked is not None:
                before = new.num_computed_tokens
                tracked.block_ids = [list(ids) for ids in new.block_ids]
                tracked.computed = before + output.num_scheduled_tokens[new.req_id]
                yield tracked, tracked.block_ids, before, tracked.computed

    def _go_on(self, output: SchedulerOutput) -> Iterator[Row]:
        """Those that are not: they get more blocks, or all of theirs again once preempted."""
        scheduled, cached = output.num_scheduled_tokens, output.scheduled_cached_reqs
        rows = zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
        for request_id, block_ids, before in rows:
            tracked = self.get(request_id)
            if tracked is None:
                continue
            if request_id in cached.resumed_req_ids:
                tracked.block_ids = [[] for _ in range(self._num_groups)]
            for group, new_ids in enumerate(block_ids or ()):
                tracked.block_ids[group] += new_ids
            tracked.computed = before + scheduled[request_id]
            yield tracked, tracked.block_ids, before, tracked.computed
