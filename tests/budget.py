"""How many examples a test draws: a share of the profile's, so that `make fuzz` draws more."""

from __future__ import annotations

from typing import Any

from hypothesis import settings


def budget(percent: int, **more: Any) -> settings:
    """Settings with so many of a hundred of the profile's examples."""
    return settings(max_examples=settings().max_examples * percent // 100, **more)
