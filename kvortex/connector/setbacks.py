"""Setbacks: who goes back after a load that failed, and has vLLM know of it. Scheduler side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvortex.connector.steps_under_way import StepsUnderWay

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from kvortex.connector.gpu_blocks import GpuBlocks
    from kvortex.connector.model_runner import ModelRunner
    from kvortex.connector.tracked_requests import Row, TrackedRequests


class Setbacks:
    """Nobody is to find, and all compute again, what was computed from wrong bytes.

    vLLM leaves all of it under its hashes, also what requests computed that are gone since; and of
    those that share a block it sends only the first one back.

    Args:
        requests: who may have to go back.
        gpu: where spoilt blocks are found.
        block_tokens: of the KV cache.
        runner: vLLM's, if that has to be told of requests that go back.
    """

    def __init__(
        self,
        requests: TrackedRequests,
        gpu: GpuBlocks,
        block_tokens: int,
        runner: ModelRunner | None = None,
    ) -> None:
        self._requests = requests
        self._gpu = gpu
        self._block_tokens = block_tokens
        self._runner = runner
        self._steps = StepsUnderWay(block_tokens)
        self._untold: set[str] = set()
        """Those that went back, and did not run since."""

    def mend(self, output: SchedulerOutput) -> None:
        """Put right what vLLM and its model runner do not know as they begin a step."""
        for request_id in output.preempted_req_ids or ():
            self._preempted(request_id)
        if self._untold:
            self._tell_runner(output)

    def begin(self, step: int, rows: list[Row], *, waits: bool) -> None:
        """A step is planned; `waits` for a load or not."""
        self._steps.begin(step, rows, waits=waits)

    def settle(self, step: int | None, bad: set[int]) -> None:
        """A step is reported, and the blocks whose load failed for it."""
        if step is not None:
            self._steps.drop_before(step)
        if bad:
            self._spoil(bad)
        if step is not None:
            self._steps.drop_before(step + 1)

    def _spoil(self, bad: set[int]) -> None:
        spoilt = self._steps.spoilt_by(bad)
        self._gpu.evict(spoilt)
        for request_id, tracked in self._requests.items():
            wrong = [n for ids in tracked.block_ids for n, i in enumerate(ids) if i in spoilt]
            if wrong:
                tracked.compute_again(min(wrong) * self._block_tokens)
                self._untold.add(request_id)

    def _preempted(self, request_id: str) -> None:
        """vLLM keeps a token that it has not seen yet of a request that it preempts, even if it
        turns out to come from a failed load."""
        if self._steps.wait_for_loads and request_id in self._requests:
            self._requests[request_id].drop_output()

    def _tell_runner(self, output: SchedulerOutput) -> None:
        """There is none to tell that waits for each step: that one sees for itself."""
        again = [tracked for name, tracked in self._requests.items() if name in self._untold]
        if again and self._runner is not None:
            self._runner.hand_over(output, again)
        self._untold &= self._requests.keys() - output.num_scheduled_tokens.keys()
