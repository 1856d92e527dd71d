"""ModelRunner: has vLLM's model runner forget what it knows of requests that went back.

Scheduler side. A runner keeps the state of a request from step to step, and is sent what changes;
where a load turned out to have failed, that state is wrong.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.output import CachedRequestData, NewRequestData

if TYPE_CHECKING:
    from collections.abc import Collection

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from kvortex.connector.tracked_request import TrackedRequest


class ModelRunner(ABC):
    """Rewrites what vLLM's scheduler is about to send to its model runner.

    Args:
        vllm_config: of an engine with that runner.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        known = inspect.signature(NewRequestData.from_request).parameters
        uses_mrope = vllm_config.model_config.uses_mrope
        self._also: dict[str, Any] = {"uses_mrope": uses_mrope} if "uses_mrope" in known else {}

    def hand_over(self, output: SchedulerOutput, went_back: Collection[TrackedRequest]) -> None:
        """Those that this step schedules; their `block_ids` are up to date."""
        again = {tracked.request.request_id: tracked for tracked in went_back}
        scheduled = [again[name] for name in output.scheduled_cached_reqs.req_ids if name in again]
        if scheduled:
            self._rewrite(output, scheduled)

    @abstractmethod
    def _rewrite(self, output: SchedulerOutput, again: list[TrackedRequest]) -> None: ...

    def _make_new(
        self, output: SchedulerOutput, again: Collection[TrackedRequest], *, with_outputs: bool
    ) -> None:
        """Turn them into new ones, of which outputs are to be prefilled if they have any."""
        for tracked in again:
            tokens = tracked.request._all_token_ids if with_outputs else None
            new = NewRequestData.from_request(
                tracked.request, blocks_of(tracked), tokens, **self._also
            )
            output.scheduled_new_reqs.append(new)
        names = {tracked.request.request_id for tracked in again}
        output.scheduled_cached_reqs = _without(output.scheduled_cached_reqs, names)


def blocks_of(tracked: TrackedRequest) -> tuple[list[int], ...]:
    """All of its GPU blocks by KV cache group, for the runner to keep."""
    return tuple(list(ids) for ids in tracked.block_ids)


def _without(cached: CachedRequestData, leaving: Collection[str]) -> CachedRequestData:
    kept = [number for number, name in enumerate(cached.req_ids) if name not in leaving]

    def of_kept(rows: list[Any]) -> list[Any]:
        return [rows[number] for number in kept] if rows else []

    return CachedRequestData(
        req_ids=of_kept(cached.req_ids),
        resumed_req_ids=cached.resumed_req_ids - set(leaving),
        new_token_ids=of_kept(cached.new_token_ids),
        all_token_ids={k: v for k, v in cached.all_token_ids.items() if k not in leaving},
        new_block_ids=of_kept(cached.new_block_ids),
        num_computed_tokens=of_kept(cached.num_computed_tokens),
        num_output_tokens=of_kept(cached.num_output_tokens),
    )
