"""StepClock: how long the engine's steps take, as the scheduler sees them. Scheduler side."""

from __future__ import annotations

import time

MOST_STEPS = 64
"""Steps under way at once; more only pile up where nobody tells of their end."""


class StepClock:
    """Times each step from its plan to its report. Steps overlap, but end in order.

    They are known by numbers, because vLLM does not pass on what the workers of every step report.
    """

    def __init__(self) -> None:
        self._under_way: dict[int, tuple[float, int]] = {}
        self._last_end = 0.0
        self._next = 0

    def begin(self, num_tokens: int) -> int:
        """A step is planned that computes so many tokens; returns its number."""
        step = self._next
        self._next += 1
        self._under_way.pop(step - MOST_STEPS, None)
        self._under_way[step] = (time.perf_counter(), num_tokens)
        return step

    def end(self, step: int) -> tuple[int, float]:
        """A step ended: its tokens, and for how long the engine was busy with it alone."""
        now = time.perf_counter()
        began, num_tokens = self._under_way.pop(step, (now, 0))
        seconds = now - max(began, self._last_end)
        self._last_end = now
        return num_tokens, seconds
