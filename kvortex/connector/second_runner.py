"""SecondRunner: has vLLM's second model runner go back, too, when a load turns out to have failed.

That runner counts computed tokens on the GPU, and takes vLLM's count only of a request that is new
to it. So one that went back is handed over as new, which is what vLLM does after a preemption.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.output import CachedRequestData, NewRequestData

if TYPE_CHECKING:
    from collections.abc import Collection

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from kvortex.connector.tracked_request import TrackedRequest


class SecondRunner:
    """Rewrites what vLLM's scheduler is about to send to its model runner.

    Args:
        vllm_config: of an engine with that runner.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        known = inspect.signature(NewRequestData.from_request).parameters
        uses_mrope = vllm_config.model_config.uses_mrope
        self._also: dict[str, Any] = {"uses_mrope": uses_mrope} if "uses_mrope" in known else {}

    def hand_over(self, output: SchedulerOutput, went_back: Collection[TrackedRequest]) -> None:
        """Turn those that this step schedules into new ones; their `block_ids` are up to date."""
        cached = output.scheduled_cached_reqs
        again = {tracked.request.request_id: tracked for tracked in went_back}
        again = {name: again[name] for name in cached.req_ids if name in again}
        if not again:
            return
        for tracked in again.values():
            blocks = tuple(list(ids) for ids in tracked.block_ids)
            tokens = tracked.request._all_token_ids
            new = NewRequestData.from_request(tracked.request, blocks, tokens, **self._also)
            output.scheduled_new_reqs.append(new)
        output.scheduled_cached_reqs = _without(cached, again)


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
