"""What errors have in common, whose message is one line that can be shown anywhere; and values."""

from __future__ import annotations

import pytest

from kvortex.core import BlockNotFoundError, ConfigError, PoolAllocationError, shown, shown_bytes


@pytest.mark.parametrize("kind", [ConfigError, PoolAllocationError, BlockNotFoundError])
def test_an_errors_message_is_one_line(kind: type[Exception]) -> None:
    assert str(kind("two\nlines \x1b[2J \ud800 of ünicode")) == (
        r"two\nlines \x1b[2J \ud800 of ünicode"
    )
    assert str(kind()) == ""


def test_values_are_shown_short() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown("a\n") == r"'a\n'"
    assert shown("x" * 100) == "'" + "x" * 76 + "..."
    assert shown(10**5000) == "a int too large to be shown"
    assert shown(deep) == "a list too large to be shown"
    while deep:  # else its end is as deep
        deep = deep.pop()  # type: ignore[assignment]


def test_bytes_are_shown_in_the_largest_unit_of_which_there_is_one() -> None:
    sizes = (0, 1023, 1024, 1536, 5 << 20, 1 << 30, 3 << 40)
    told = ["0 B", "1023 B", "1 KiB", "1.5 KiB", "5 MiB", "1 GiB", "3072 GiB"]
    assert [shown_bytes(size) for size in sizes] == told
