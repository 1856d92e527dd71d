"""What vLLM is told of KVortex's counters and gauges, with the real Prometheus client."""

from __future__ import annotations

from typing import Any

import pytest

from kvortex.metrics import MISSED, Counters, Gauges, MissReason

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


def test_only_changes_are_told() -> None:
    from kvortex.connector.stats import Changes

    changes, counters = Changes(), Counters()
    assert changes.take(counters, Gauges()) is None
    counters.stored_blocks, counters.load_seconds = 3, 0.5
    told = changes.take(counters, Gauges(slots=8))
    assert told is not None
    assert told.data == {"stored_blocks": 3, "load_seconds": 0.5, "slots": 8}
    counters.stored_blocks = 5
    told = changes.take(counters, Gauges(slots=8))
    assert told is not None
    assert told.data == {"stored_blocks": 2}
    assert changes.take(counters, Gauges(slots=8)) is None


def test_counters_add_up_and_gauges_are_the_newest() -> None:
    from kvortex.connector.stats import KVortexStats

    one = KVortexStats({"stored_blocks": 3, "resident_slots": 8})
    both = one.aggregate(KVortexStats({"stored_blocks": 4, "resident_slots": 2}))
    assert both.data == {"stored_blocks": 7, "resident_slots": 2}
    assert both.reduce() == {"stored_blocks": 7, "resident_slots": 2}
    assert not both.is_empty()
    both.reset()
    assert both.is_empty()


def test_every_counter_and_gauge_has_a_metric() -> None:
    from prometheus_client import Counter, Gauge, Histogram, generate_latest
    from prometheus_client.registry import CollectorRegistry
    from vllm.config import VllmConfig

    from kvortex.connector.stats import KVortexPromMetrics

    registry = CollectorRegistry()

    def into(kind: Any) -> Any:
        return lambda **settings: kind(**settings, registry=registry)

    kinds = {Counter: into(Counter), Gauge: into(Gauge), Histogram: into(Histogram)}
    metrics = KVortexPromMetrics(VllmConfig(), kinds, ["engine"], {0: ["0"], 1: ["1"]})
    metrics.observe({"stored_blocks": 3, "slots": 8, "of another version": 1}, 0)
    metrics.observe({"stored_blocks": 4, "slots": 7}, 0)
    metrics.observe({"stored_blocks": 1, MISSED + MissReason.LATE: 32}, 1)
    text = generate_latest(registry).decode()
    assert 'vllm:kvortex_stored_blocks_total{engine="0"} 7.0' in text
    assert 'vllm:kvortex_stored_blocks_total{engine="1"} 1.0' in text
    assert 'vllm:kvortex_slots{engine="0"} 7.0' in text
    assert 'vllm:kvortex_missed_tokens_total{engine="1",reason="late"} 32.0' in text
    assert 'vllm:kvortex_failed_loads_total{engine="1"} 0.0' in text
    for reason in MissReason:
        assert f'vllm:kvortex_missed_tokens_total{{engine="0",reason="{reason}"}} 0.0' in text
    for name in Counters().as_dict():
        if not name.startswith(MISSED):
            assert f"# TYPE vllm:kvortex_{name}_total counter" in text
    for name in Gauges().as_dict():
        assert f"# TYPE vllm:kvortex_{name} gauge" in text
