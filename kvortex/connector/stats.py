"""KVortex's counters on vLLM's own roads: its periodic log line and its /metrics page."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvortex.metrics import Counters

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class KVortexStats(KVConnectorStats):
    """Counter name to increase since the last step."""

    data: dict[str, int]

    def reset(self) -> None:
        """Start again from nothing."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another's increases to these."""
        for name, increase in other.data.items():
            self.data[name] = self.data.get(name, 0) + increase
        return self

    def reduce(self) -> dict[str, int | float]:
        """What the log line shows."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """Whether nothing increased."""
        return not any(self.data.values())


class CounterDiff:
    """Remembers what was last handed out of some counters."""

    def __init__(self) -> None:
        self._last = Counters().as_dict()

    def take(self, counters: Counters) -> KVortexStats | None:
        """Increases since the last call; None if there are none."""
        now = counters.as_dict()
        increase = {
            name: now[name] - self._last[name] for name in now if now[name] != self._last[name]
        }
        self._last = now
        return KVortexStats(increase) if increase else None


class KVortexPromMetrics(KVConnectorPromMetrics):
    """`vllm:kvortex_<counter>_total` for each counter, labelled like vLLM's own metrics.

    The prefix is vLLM's for its connectors: by it vLLM finds what a former engine registered.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            counter.name: self._counter_cls(
                name=f"vllm:kvortex_{counter.name}",
                documentation=f"KVortex: {counter.name.replace('_', ' ')} since start.",
                labelnames=labelnames,
            )
            for counter in fields(Counters)
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one step's increases."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, increase in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name].labels(*labels).inc(increase)
