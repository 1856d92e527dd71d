"""Which requests read a block whose load failed before it was computed again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

if TYPE_CHECKING:
    from kvortex.connector.bad_blocks import BadBlocks

BLOCKS = [7, 8, 9]


def bad() -> BadBlocks:
    """Of blocks of four tokens, the second and the third of two requests."""
    from kvortex.connector.bad_blocks import BadBlocks

    blocks = BadBlocks(4)
    assert not blocks
    blocks.add({8, 9})
    assert blocks
    return blocks


@pytest.mark.parametrize(
    ("first", "read"), [(0, set()), (4, set()), (5, {8}), (8, {8}), (12, {8, 9}), (99, {8, 9})]
)
def test_what_lies_before_the_first_computed_token_is_read(first: int, read: set[int]) -> None:
    assert bad().read("a", BLOCKS, first) == read


def test_a_block_that_was_computed_again_is_good() -> None:
    blocks = bad()
    blocks.compute("a", BLOCKS, 4, 8)
    assert blocks.read("b", BLOCKS, 12) == {9}
    blocks.compute("a", BLOCKS, 8, 20)
    assert blocks.read("b", BLOCKS, 12) == set()
    assert not blocks


def test_half_a_block_is_good_for_who_computes_it_only() -> None:
    blocks = bad()
    blocks.compute("a", BLOCKS, 4, 6)
    assert blocks.read("a", BLOCKS, 6) == set()
    assert blocks.read("b", BLOCKS, 12) == {8, 9}
    blocks.compute("b", BLOCKS, 6, 8)  # it goes on behind what it did not compute
    assert blocks.read("b", BLOCKS, 8) == {8}
    blocks.compute("a", BLOCKS, 6, 8)
    assert blocks.read("b", BLOCKS, 8) == set()


def test_other_contents_are_good() -> None:
    blocks = bad()
    blocks.discard([8, 9, 10])
    assert not blocks
