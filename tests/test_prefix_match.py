"""The longest prefix that all KV cache groups can restore, against a search that tries them all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.prefix_match import Reach, longest_prefix

REACHES = st.one_of(
    st.just(Reach()),
    st.builds(Reach, window=st.integers(1, 40)),
    st.builds(Reach, chunk=st.integers(1, 40)),
)


def naive(
    readable: set[bytes], keys: list[list[bytes]], reaches: list[Reach], first: int, size: int
) -> int:
    """The last end for which no token that a layer looks at is missing."""

    def works(end: int) -> bool:
        return all(
            of_group[number - first] in readable
            for of_group, reach in zip(keys, reaches, strict=True)
            for number in range(first, end)
            if (number + 1) * size > reach.first_token(end * size)
        )

    return next(end for end in range(first + len(keys[0]), first - 1, -1) if works(end))


@pytest.mark.fuzz
@given(st.data())
def test_same_as_trying_every_length(data: st.DataObject) -> None:
    reaches = data.draw(st.lists(REACHES, min_size=1, max_size=3))
    blocks, first = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 5))
    size = data.draw(st.integers(1, 8))
    keys = [[bytes([group, i]) for i in range(blocks)] for group in range(len(reaches))]
    every = [key for of_group in keys for key in of_group]
    missing = data.draw(st.sets(st.sampled_from(every), max_size=4)) if every else set()
    readable = set(every) - missing
    expected = naive(readable, keys, reaches, first, size)
    assert longest_prefix(readable, keys, reaches, first, size) == expected
    fewer = readable - data.draw(st.sets(st.sampled_from(every), max_size=4)) if every else set()
    known = longest_prefix(fewer, keys, reaches, first, size)
    assert longest_prefix(readable, keys, reaches, first, size, known) == expected


def test_what_a_window_looks_back_to() -> None:
    assert Reach().first_token(100) == 0
    assert Reach(window=1).first_token(100) == 100
    assert Reach(window=4).first_token(7) == 4
    assert Reach(window=64).first_token(10) == 0
    assert Reach(chunk=8).first_token(15) == 8
    assert Reach(chunk=8).first_token(16) == 16
