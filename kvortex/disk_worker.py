"""DiskWorker: carries out DiskPlans on one rank's disk and reports what became of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvortex.core import DiskPlan, DiskReport
from kvortex.disk.report import TOLD

if TYPE_CHECKING:
    from kvortex.disk import DiskStore


class DiskWorker:
    """On the model's thread, which never waits for the disk.

    Args:
        store: open; closed by whoever opened it.
    """

    def __init__(self, store: DiskStore) -> None:
        self._store = store
        self._survivors: dict[bytes, int] | None = self._found()
        """Until they were told: sorted before any step waits for it."""
        self._counted = dict.fromkeys(TOLD, 0)
        self._off = (False, False)

    def begin(self, plan: DiskPlan) -> None:
        """Start what is planned."""
        if plan.clear:
            self._store.clear()
        if plan.erases:
            self._store.erase(plan.erases)
        for move in plan.writes:
            slots, disk_slots = move.slots.tolist(), move.disk_slots.tolist()
            self._store.write(move.id, move.keys, slots, disk_slots)
        for move in plan.reads:
            slots, disk_slots = move.slots.tolist(), move.disk_slots.tolist()
            self._store.read(move.id, move.keys, disk_slots, slots)

    def report(self) -> DiskReport | None:
        """What ended since the last report; at first also what was on the disk."""
        told = self._store.poll()
        ended, counted = told.ended, self._take_counted()
        off, before = (told.reading_off, told.writing_off), self._off
        survivors, self._survivors = self._survivors, None
        if survivors is None and not ended and not counted and off == before:
            return None
        self._off = off
        return DiskReport(
            dict.fromkeys(ended, 1),
            {move_id: positions for move_id, positions in ended.items() if positions},
            told.lost,
            survivors,
            None if survivors is None else self._store.num_slots,
            counted,
            off[0] - before[0],
            off[1] - before[1],
        )

    def _take_counted(self) -> dict[str, int]:
        """What was added to counters since the last call."""
        before = self._counted
        self._counted = {name: getattr(self._store.counters, name) for name in TOLD}
        return {name: n - before[name] for name, n in self._counted.items() if n != before[name]}

    def _found(self) -> dict[bytes, int]:
        """Keys in the order in which they were written."""
        found = self._store.survivors
        order = found.generations.argsort().tolist()
        keys, slots = found.keys, found.slots.tolist()
        return {keys[i]: slots[i] for i in order}
