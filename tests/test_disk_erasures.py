"""Erasures: what shall be forgotten is, by memory at once, by the disk when it can; without one."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from kvortex.disk.breaker import ERRORS_IN_A_ROW, Breaker
from kvortex.disk.erasures import Erasures
from kvortex.disk.moves import ERASE, WIPE

if TYPE_CHECKING:
    from kvortex.disk.slots import SlotFiles


class Files:
    """Notes what is asked of them, and may fail."""

    num_slots = 8

    def __init__(self) -> None:
        self.calls: list[str | tuple[str, int]] = []
        self.fails = False

    def forget(self, slot: int) -> None:
        self.calls.append(("forget", slot))

    def erase(self, slot: int) -> None:
        self.calls.append(("erase", slot))

    def renounce(self) -> None:
        self.calls.append("renounce")

    def wipe(self) -> None:
        if self.fails:
            raise OSError("broken")
        self.calls.append("wipe")


class Disk:
    """What shall be forgotten of it, and what its lanes were ordered to do."""

    def __init__(self) -> None:
        self.files = Files()
        self.writing = Breaker("writing")
        self.room = 100
        self.orders: list[tuple[int, int]] = []
        self.erasures = Erasures(cast("SlotFiles", self.files), self.order, self.writing)

    def order(self, what: int, slot: int) -> bool:
        if self.room:
            self.room -= 1
            self.orders.append((what, slot))
            return True
        return False

    def ordered(self) -> list[tuple[int, int]]:
        """By another push."""
        self.orders.clear()
        self.erasures.push()
        return sorted(self.orders)

    def finished(self, *torn: int) -> list[str | tuple[str, int]]:
        """What is left to the end."""
        self.files.calls.clear()
        self.erasures.finish(torn)
        return sorted(self.files.calls, key=str)


def test_memory_forgets_slots_at_once_and_lanes_are_ordered_once() -> None:
    disk = Disk()
    disk.erasures.add([3, 5, 3, 8, -1])
    assert disk.files.calls == [("forget", 3), ("forget", 5), ("forget", 3)]
    assert disk.ordered() == [(ERASE, 3), (ERASE, 5)]
    assert disk.ordered() == []
    assert disk.finished() == [("erase", 3), ("erase", 5)]  # nobody has answered
    disk.erasures.settle(ERASE, 3, well=True)
    assert disk.finished() == [("erase", 5)]


def test_what_finds_no_room_is_ordered_later() -> None:
    disk = Disk()
    disk.room = 2
    disk.erasures.add(range(3))
    first = disk.ordered()
    assert len(first) == 2
    assert disk.ordered() == []
    disk.room = 2
    assert sorted(first + disk.ordered()) == [(ERASE, slot) for slot in range(3)]


def test_what_failed_is_ordered_again_unless_writing_is_off_by_that() -> None:
    disk = Disk()
    disk.erasures.add([4])
    for _ in range(ERRORS_IN_A_ROW):
        assert not disk.writing.is_off
        assert disk.ordered() == [(ERASE, 4)]
        disk.erasures.settle(ERASE, 4, well=False)
    assert disk.writing.is_off
    assert disk.ordered() == []
    disk.writing.end_trial(0.0, well=True)
    assert disk.ordered() == [(ERASE, 4)]


def test_what_goes_well_is_a_use_of_the_drive_that_went_well() -> None:
    disk = Disk()
    for _ in range(ERRORS_IN_A_ROW - 1):
        disk.writing.fail(0.0, "broken")
    disk.erasures.settle(ERASE, 4, well=True)
    disk.writing.fail(0.0, "broken")
    assert not disk.writing.is_off


def test_a_slot_that_is_written_again_is_not_erased_behind_it() -> None:
    disk = Disk()
    disk.erasures.add([1, 2])
    disk.erasures.replace([2, 7])
    assert disk.ordered() == [(ERASE, 1)]
    assert disk.finished() == [("erase", 1)]
    disk.erasures.replaced(2, well=True)
    disk.erasures.replaced(7, well=False)
    assert disk.finished() == [("erase", 1)]


def test_nor_where_its_erasure_fails_while_the_other_record_is_on_its_way() -> None:
    disk = Disk()
    disk.erasures.add([1])
    assert disk.ordered() == [(ERASE, 1)]
    disk.erasures.replace([1])
    disk.erasures.settle(ERASE, 1, well=False)
    assert disk.ordered() == []
    disk.erasures.replaced(1, well=True)
    assert disk.ordered() == []
    assert disk.finished() == []


@pytest.mark.parametrize("pushed", [True, False])
def test_what_was_to_be_replaced_and_was_not_is_erased(pushed: bool) -> None:
    disk = Disk()
    disk.erasures.add([1])
    if pushed:
        disk.erasures.push()
    disk.erasures.replace([1])
    if pushed:
        disk.erasures.settle(ERASE, 1, well=False)
    disk.erasures.replaced(1, well=False)
    assert disk.ordered() == [(ERASE, 1)]


def test_what_is_erased_while_it_is_written_is_erased_behind_it() -> None:
    disk = Disk()
    disk.erasures.add([1])
    disk.erasures.replace([1])
    disk.erasures.add([1])
    disk.erasures.replaced(1, well=True)
    assert disk.ordered() == [(ERASE, 1)]


def test_all_are_forgotten_by_one_order_which_is_given_until_it_goes_well() -> None:
    disk = Disk()
    disk.erasures.add([1, 2])
    disk.erasures.add_all()
    assert disk.files.calls[-1] == "renounce"
    disk.erasures.add([6])  # is being written, and may come after
    disk.room = 0
    assert disk.ordered() == []
    disk.room = 100
    assert disk.ordered() == [(WIPE, 0), (ERASE, 6)]
    assert disk.ordered() == []
    disk.erasures.settle(WIPE, 0, well=False)
    assert disk.ordered() == [(WIPE, 0)]
    disk.erasures.settle(WIPE, 0, well=True)
    disk.erasures.settle(ERASE, 6, well=True)
    assert disk.ordered() == []
    assert disk.finished() == []


def test_all_that_is_forgotten_anew_during_a_wipe_takes_another() -> None:
    disk = Disk()
    for _ in range(2):
        disk.erasures.add_all()
        assert disk.ordered() == [(WIPE, 0)]
    disk.erasures.settle(WIPE, 0, well=True)
    disk.erasures.add_all()
    disk.erasures.settle(WIPE, 0, well=True)
    assert disk.ordered() == [(WIPE, 0)]


@pytest.mark.parametrize("pushed", [True, False])
def test_what_is_left_is_erased_in_the_end_and_what_is_half_written(pushed: bool) -> None:
    disk = Disk()
    disk.erasures.add_all()
    disk.erasures.add([6])
    if pushed:
        disk.erasures.push()
    assert disk.finished(6, 7) == [("erase", 6), ("erase", 7), "wipe"]
    disk.files.fails = True
    with pytest.raises(OSError, match="broken"):
        disk.erasures.finish([])
