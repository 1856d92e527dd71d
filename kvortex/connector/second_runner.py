"""SecondRunner: has vLLM's second model runner go back, too, when a load turns out to have failed.

That runner counts computed tokens on the GPU, and takes vLLM's count only of a request that is new
to it. So one that went back is handed over as new, which is what vLLM does after a preemption.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvortex.connector.model_runner import ModelRunner

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from kvortex.connector.tracked_request import TrackedRequest


class SecondRunner(ModelRunner):
    """Makes all of them new."""

    def _rewrite(self, output: SchedulerOutput, again: list[TrackedRequest]) -> None:
        self._make_new(output, again, with_outputs=True)
