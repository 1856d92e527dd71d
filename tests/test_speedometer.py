"""How measures of the link become one speed."""

from __future__ import annotations

import pytest

from kvortex.speedometer import Speedometer


def test_nothing_is_known_before_a_measure() -> None:
    assert Speedometer().bytes_per_s is None


def test_newer_measures_count_more() -> None:
    meter = Speedometer()
    meter.note(100, 1.0)
    assert meter.bytes_per_s == 100
    meter.note(100, 2.0)
    assert meter.bytes_per_s == pytest.approx(180 / 2.8)
    for _ in range(50):
        meter.note(100, 2.0)
    assert meter.bytes_per_s == pytest.approx(50, rel=0.01)


def test_overlapping_copies_share_their_seconds() -> None:
    meter = Speedometer()
    meter.note(100, 0.0)
    assert meter.bytes_per_s is None
    meter.note(100, 2.0)
    assert meter.bytes_per_s == pytest.approx(90)


def test_what_was_slow_long_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("kvortex.speedometer.time.monotonic", lambda: now)
    meter = Speedometer()
    meter.note(100, 1.0)
    meter.note(100, 1000.0)
    assert meter.bytes_per_s == pytest.approx(180 / 1000.8)
    now += 61
    assert meter.bytes_per_s == 100
    meter.note(100, 2.0)
    assert meter.bytes_per_s == 50
