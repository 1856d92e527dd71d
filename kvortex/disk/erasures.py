"""Erasures: what the disk shall forget, until it has. Owned by a store's thread."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvortex.disk.moves import ERASE, WIPE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvortex.disk.breaker import Breaker
    from kvortex.disk.slots import SlotFiles


class Erasures:
    """Slots whose records shall be erased, or all records at once. Memory forgets them right away;
    lanes have the disk forget them when it can be written and there is room.

    Args:
        files: of the slots.
        order: has the lane that changes a slot ERASE it, or WIPE all; returns whether it had room.
        writing: by which nothing is ordered while that is off, and which is told how it went.
    """

    def __init__(
        self, files: SlotFiles, order: Callable[[int, int], bool], writing: Breaker
    ) -> None:
        self._files = files
        self._order = order
        self._writing = writing
        self._unerased: set[int] = set()
        """Slots for which no lane had room yet."""
        self._erasing: set[int] = set()
        self._replaced: set[int] = set()
        """Slots to erase that are written meanwhile: if that succeeds they are not erased."""
        self._to_wipe = self._wiping = False

    def add(self, slots: Iterable[int]) -> None:
        """Those that exist."""
        for slot in slots:
            if 0 <= slot < self._files.num_slots:
                self._files.forget(slot)
                self._unerased.add(slot)
                self._replaced.discard(slot)

    def add_all(self) -> None:
        """Also what will be written from now on, after a restart."""
        self._files.renounce()
        self._to_wipe = True
        self._unerased.clear()
        self._replaced.clear()

    def replace(self, slots: Iterable[int]) -> None:
        """Slots get another record, in order with what was pushed; see `replaced`."""
        slots = set(slots)
        self._replaced |= slots & (self._unerased | self._erasing)
        self._unerased -= slots

    def replaced(self, slot: int, *, well: bool) -> None:
        """The record has been written, or the old one may still be there."""
        if slot in self._replaced:
            self._replaced.discard(slot)
            if not well:
                self._unerased.add(slot)

    def push(self) -> None:
        """What finds no room in its lane, or cannot be written now, is pushed later."""
        if self._writing.is_off:
            return
        if self._to_wipe and self._order(WIPE, 0):
            self._to_wipe, self._wiping = False, True
        for slot in list(self._unerased):
            if self._order(ERASE, slot):
                self._unerased.discard(slot)
                self._erasing.add(slot)

    def settle(self, what: int, slot: int, *, well: bool) -> None:
        """Take in the answer to an ERASE or a WIPE; what went wrong is pushed again."""
        if what == WIPE:
            self._wiping = False
            self._to_wipe = self._to_wipe or not well
        else:
            self._erasing.discard(slot)
            if not well and slot not in self._replaced:
                self._unerased.add(slot)
        if well:
            self._writing.succeed()
        else:
            self._writing.fail(time.monotonic(), "a record cannot be erased")

    def finish(self, torn: Iterable[int]) -> None:
        """After the lanes have ended: erase all that is left, and slots that are half written.

        Raises:
            OSError: after a restart slots may hold again what they held.
        """
        if self._to_wipe or self._wiping:
            self._files.wipe()
        for slot in self._unerased | self._erasing | set(torn):
            self._files.erase(slot)
