"""How long steps take that overlap, or of which nobody hears."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from kvortex.step_clock import MOST_STEPS, StepClock

if TYPE_CHECKING:
    from collections.abc import Callable

Ticking = tuple[StepClock, "Callable[[float], None]"]


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Ticking:
    """A clock, and how to let time pass on it."""
    now = [100.0]
    own = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("kvortex.step_clock.time", own)

    def wait(seconds: float) -> None:
        now[0] += seconds

    return StepClock(), wait


def test_a_step_takes_from_plan_to_report(ticking: Ticking) -> None:
    clock, wait = ticking
    step = clock.begin(8192)
    wait(0.5)
    assert clock.end(step) == (8192, 0.5)


def test_a_step_that_was_planned_early_begins_when_the_one_before_ends(ticking: Ticking) -> None:
    clock, wait = ticking
    one, other = clock.begin(10), clock.begin(20)
    wait(0.5)
    assert clock.end(one) == (10, 0.5)
    wait(0.25)
    assert clock.end(other) == (20, 0.25)


def test_steps_that_nobody_hears_of_disturb_no_other(ticking: Ticking) -> None:
    clock, wait = ticking
    for _ in range(3 * MOST_STEPS):
        clock.begin(0)
    step = clock.begin(8192)
    wait(0.5)
    assert clock.end(step) == (8192, 0.5)
    assert len(clock._under_way) < MOST_STEPS
    assert clock.end(0) == (0, 0.0)
