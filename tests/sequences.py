"""Sequences of steps for hypothesis to draw, long enough for something to come of them."""

from __future__ import annotations

from typing import TypeVar

from hypothesis import strategies as st

Step = TypeVar("Step")


def up_to(most: int, steps: st.SearchStrategy[Step]) -> st.SearchStrategy[list[Step]]:
    """Every length is as likely; `st.lists` alone draws five elements, whatever the most is."""
    return st.integers(0, most).flatmap(lambda n: st.lists(steps, min_size=n, max_size=n))
