"""What vLLM carries between the two sides of the connector: a StepPlan out, a StepReport back."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvortex.core import StepPlan, StepReport


@dataclass
class PlanMessage(KVConnectorMetadata):
    """Scheduler to every worker, once a step."""

    plan: StepPlan = field(default_factory=StepPlan)


@dataclass
class ReportMessage(KVConnectorWorkerMetadata):
    """Worker to scheduler; vLLM merges those of all ranks with `aggregate`."""

    report: StepReport

    def aggregate(self, other: KVConnectorWorkerMetadata) -> ReportMessage:
        """The report of both ranks."""
        assert isinstance(other, ReportMessage)
        return ReportMessage(self.report.merge(other.report))
