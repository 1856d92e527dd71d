"""KVortex's counters and gauges on vLLM's own roads: its periodic log line and its /metrics."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvortex.metrics import MISSED, Counters, Gauges, MissReason

GAUGES = {gauge.name for gauge in fields(Gauges)}

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class KVortexStats(KVConnectorStats):
    """Name of a counter to its increase since the last step, or of a gauge to its value."""

    data: dict[str, int | float]

    def reset(self) -> None:
        """Start again from nothing."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another's increases to these; its gauges are the newer ones."""
        for name, number in other.data.items():
            self.data[name] = number if name in GAUGES else self.data.get(name, 0) + number
        return self

    def reduce(self) -> dict[str, int | float]:
        """What the log line shows."""
        return {name: round(number, 3) for name, number in self.data.items()}

    def is_empty(self) -> bool:
        """Whether nothing changed."""
        return not self.data


class Changes:
    """Remembers what was last handed out."""

    def __init__(self) -> None:
        self._counters = Counters().as_dict()
        self._gauges = Gauges().as_dict()

    def take(self, counters: Counters, gauges: Gauges) -> KVortexStats | None:
        """Increases and new values since the last call; None if there are none."""
        now, levels = counters.as_dict(), gauges.as_dict()
        if now == self._counters and levels == self._gauges:
            return None
        changed: dict[str, int | float] = {
            name: now[name] - self._counters[name]
            for name in now
            if now[name] != self._counters[name]
        }
        changed |= {name: levels[name] for name in levels if levels[name] != self._gauges[name]}
        self._counters, self._gauges = now, levels
        return KVortexStats(changed)


class KVortexPromMetrics(KVConnectorPromMetrics):
    """`vllm:kvortex_<counter>_total` and `vllm:kvortex_<gauge>`, labelled like vLLM's own metrics.

    Misses are one counter, `vllm:kvortex_missed_tokens_total`, with the label `reason`.
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
        # Of several API servers' processes, one has the newest word on an engine.
        gauge = partial(self._gauge_cls, multiprocess_mode="mostrecent")
        metrics = {
            metric.name: kind(
                name=f"vllm:kvortex_{metric.name}",
                documentation=f"KVortex: {metric.name.replace('_', ' ')}{when}.",
                labelnames=labelnames,
            )
            for kind, group, when in (
                (self._counter_cls, fields(Counters), " since start"),
                (gauge, fields(Gauges), " now"),
            )
            for metric in group
            if not metric.name.startswith(MISSED)
        }
        missed = self._counter_cls(
            name="vllm:kvortex_missed_tokens",
            documentation="KVortex: tokens of prompts that were computed, by reason, since start.",
            labelnames=[*labelnames, "reason"],
        )
        # With all their labels at once: what is 0 shall be there, and be seen to increase.
        self._metrics = {
            engine: {name: metric.labels(*labels) for name, metric in metrics.items()}
            | {MISSED + reason: missed.labels(*labels, reason.value) for reason in MissReason}
            for engine, labels in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take in one step's changes."""
        metrics = self._metrics[engine_idx]
        for name, number in transfer_stats_data.items():
            if name in metrics:
                metrics[name].set(number) if name in GAUGES else metrics[name].inc(number)
