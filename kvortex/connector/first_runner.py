"""FirstRunner: has vLLM's first model runner go back, too, when a load turns out to have failed.

Where it runs ahead, what it samples stays on the GPU, and is the next input token of every request
that was in the step before: also of one that went back meanwhile, whose sample was dropped. Of a
request that is resumed or new it forgets that sample, also if the request was in the step before:
vLLM itself resumes requests so when it resets its cache while they run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvortex.connector.model_runner import ModelRunner, blocks_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
    from vllm.v1.request import Request

    from kvortex.connector.tracked_request import TrackedRequest


class FirstRunner(ModelRunner):
    """Has them resumed, which other connectors that are asked behind this one understand, too."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__(vllm_config)
        self._in_pipeline = vllm_config.parallel_config.pipeline_parallel_size > 1

    def _rewrite(self, output: SchedulerOutput, again: list[TrackedRequest]) -> None:
        new = [tracked for tracked in again if self._must_be_new(tracked.request)]
        others = [tracked for tracked in again if not self._must_be_new(tracked.request)]
        self._make_new(output, new, with_outputs=False)
        _resume(output.scheduled_cached_reqs, others)

    def _must_be_new(self, request: Request) -> bool:
        """Whether it would keep too much if resumed, or has too little. To be new is to have no
        outputs.

        The runner was not sent the pixels of images that were to be loaded; and of one without
        outputs, the first ranks of a pipeline go on counting a sample that was dropped.
        """
        return not request.num_output_tokens and (self._in_pipeline or bool(request.mm_features))


def _resume(cached: CachedRequestData, again: list[TrackedRequest]) -> None:
    """As vLLM does after a preemption: with all tokens, and all blocks instead of more."""
    for tracked in again:
        request = tracked.request
        cached.resumed_req_ids.add(request.request_id)
        cached.all_token_ids[request.request_id] = request.all_token_ids.copy()
        cached.new_block_ids[cached.req_ids.index(request.request_id)] = blocks_of(tracked)
