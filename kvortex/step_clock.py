"""StepClock: how long the engine's steps take, as the scheduler sees them. Scheduler side."""

from __future__ import annotations

import time
from collections import deque

MOST_STEPS = 8
"""Steps under way at once; more only pile up where nobody tells of their end."""


class StepClock:
    """Pairs the beginning of each step with its end; steps overlap, but end in order."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[float, int]] = deque(maxlen=MOST_STEPS)
        self._last_end = 0.0

    def begin(self, num_tokens: int) -> None:
        """A step is scheduled that computes so many tokens; 0 if it tells nothing of prefill."""
        self._under_way.append((time.perf_counter(), num_tokens))

    def end(self) -> tuple[int, float]:
        """The oldest step ended: its tokens and how long the engine was busy with it alone."""
        now = time.perf_counter()
        began, num_tokens = self._under_way.popleft() if self._under_way else (now, 0)
        seconds = now - max(began, self._last_end)
        self._last_end = now
        return num_tokens, seconds
