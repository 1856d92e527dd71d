"""Turns: who gives way, where nothing runs, to whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

if TYPE_CHECKING:
    from kvortex.connector.turns import Turns


@pytest.fixture
def turns() -> Turns:
    from kvortex.connector.turns import Turns

    return Turns()


def test_nobody_gives_way_to_nobody(turns: Turns) -> None:
    assert not turns.gives_way("a")


def test_others_give_way_to_who_is_loaded_until_it_is_its_turn(turns: Turns) -> None:
    turns.loaded("a")
    assert turns.gives_way("b")
    assert turns.gives_way("b")
    assert not turns.gives_way("a")
    assert not turns.gives_way("b")


def test_of_two_that_are_loaded_each_gives_way_once(turns: Turns) -> None:
    turns.loaded("a")
    turns.loaded("b")
    assert turns.gives_way("a")
    assert not turns.gives_way("b")
    assert not turns.gives_way("a")


def test_who_runs_makes_room_one_day(turns: Turns) -> None:
    turns.loaded("a")
    turns.comes()
    assert (turns.running, turns.gives_way("b")) == (1, False)
    turns.ran(())
    assert (turns.running, turns.gives_way("b")) == (0, True)
    turns.ran(("c", "d"))
    assert (turns.running, turns.gives_way("b")) == (2, False)


def test_who_ran_or_is_gone_waits_no_more(turns: Turns) -> None:
    turns.loaded("a")
    turns.loaded("b")
    turns.ran(("a",))
    turns.ran(())
    assert turns.gives_way("c")
    turns.gone("b")
    assert not turns.gives_way("c")
