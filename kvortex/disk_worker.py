"""DiskWorker: carries out DiskPlans on one rank's disk and reports what became of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvortex.core import DiskPlan, DiskReport

if TYPE_CHECKING:
    from kvortex.disk import DiskStore


class DiskWorker:
    """On the model's thread, which never waits for the disk.

    Args:
        store: open; closed by whoever opened it.
    """

    def __init__(self, store: DiskStore) -> None:
        self._store = store
        self._told = False

    def begin(self, plan: DiskPlan) -> None:
        """Start what is planned."""
        if plan.clear:
            self._store.renounce()
            self._store.clear()
        for move in plan.writes:
            slots, disk_slots = move.slots.tolist(), move.disk_slots.tolist()
            self._store.write(move.id, move.keys, slots, disk_slots)
        for move in plan.reads:
            slots, disk_slots = move.slots.tolist(), move.disk_slots.tolist()
            self._store.read(move.id, move.keys, disk_slots, slots)

    def report(self) -> DiskReport | None:
        """What ended since the last report; at first also what was on the disk."""
        told = self._store.poll()
        ended = told.ended
        if self._told and not ended:
            return None
        report = DiskReport(
            dict.fromkeys(ended, 1),
            {move_id: positions for move_id, positions in ended.items() if positions},
            told.lost,
            None if self._told else self._survivors(),
            None if self._told else self._store.num_slots,
        )
        self._told = True
        return report

    def _survivors(self) -> dict[bytes, int]:
        """Keys in the order in which they were written."""
        found = self._store.survivors
        order = found.generations.argsort().tolist()
        keys, slots = found.keys, found.slots.tolist()
        return {keys[i]: slots[i] for i in order}
