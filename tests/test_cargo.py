"""Cargo: block, slot and seed stay together, however a copy is cut or put in order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.cargo import Cargo


def cargo(count: int) -> Cargo:
    blocks = np.arange(count)
    return Cargo(blocks, blocks + 1000, -blocks)


def rows(some: Cargo) -> list[tuple[int, int, int]]:
    columns = (some.block_ids, some.slots, some.seeds)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.fuzz
@given(count=st.integers(0, 40), most=st.integers(1, 45))
def test_what_was_cut_is_the_whole_in_order(count: int, most: int) -> None:
    whole = cargo(count)
    parts = list(whole.cut(most))
    assert [row for part in parts for row in rows(part)] == rows(whole)
    assert [len(part) for part in parts[:-1]] == [most] * (len(parts) - 1)
    assert len(parts) == 1 or 0 < len(parts[-1]) <= most


@pytest.mark.parametrize("count", [0, 1, 7])
def test_what_fits_is_not_cut(count: int) -> None:
    whole = cargo(count)
    (part,) = whole.cut(7)
    assert part is whole


@pytest.mark.fuzz
@given(order=st.permutations(range(9)))
def test_in_another_order_each_block_keeps_its_slot_and_seed(order: list[int]) -> None:
    assert rows(cargo(9)[np.array(order)]) == [rows(cargo(9))[place] for place in order]


def test_a_slice_shares_the_arrays() -> None:
    whole = cargo(9)
    part = whole[2:5]
    assert rows(part) == rows(whole)[2:5]
    assert np.shares_memory(part.seeds, whole.seeds)
