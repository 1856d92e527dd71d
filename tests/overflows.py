"""Both tiers with an Overflow between them, for tests that play the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvortex.core import DiskPlan, DiskReport
from kvortex.metrics import Counters
from kvortex.overflow import Overflow
from kvortex.policies import LRU, Place
from kvortex.tiers import HostTier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvortex.core import DiskMove
    from kvortex.fetches import Fetch
    from kvortex.policies import AdmissionFilter

PLACE = Place()
BLOCK_BYTES = 1 << 20


def name(number: int) -> bytes:
    return b"key %d" % number


class Setting:
    """Both tiers and what moves between them, without workers: the test ends the moves."""

    def __init__(
        self,
        host_slots: int = 16,
        disk_slots: int = 64,
        *,
        num_ranks: int = 1,
        known: bool = True,
        admission: AdmissionFilter | None = None,
        speed: float | None = None,
    ) -> None:
        self.host = HostTier(host_slots, LRU(host_slots))
        self.disk = HostTier(disk_slots, LRU(disk_slots), admission)
        self.counters = Counters()
        self.overflow = Overflow(self.host, self.disk, self.counters, num_ranks, BLOCK_BYTES, speed)
        self._known = known
        self._num_ranks = num_ranks

    def stored(self, *keys: bytes) -> Setting:
        """Blocks in the host that are to be written."""
        blocks = self.host.reserve(keys)
        assert len(blocks) == len(keys)
        self.host.commit(blocks)
        for key in keys:
            self.overflow.write_behind.consider(key, PLACE)
        return self

    def survived(self, *keys: bytes) -> Setting:
        """Blocks of a former life."""
        self.overflow.settle(DiskReport(survivors={key: slot for slot, key in enumerate(keys)}))
        return self

    def plan(self) -> DiskPlan:
        """What the workers shall do; they have told of empty disks, unless of something else."""
        if self._known and not self.overflow.known:
            self.survived()
        return self.overflow.take_plan() or DiskPlan()

    def end(self, *moves: DiskMove, failed: Sequence[int] = (), lost: Sequence[int] = ()) -> None:
        """On every rank; of each move the same positions fail."""
        bad, gone = frozenset(failed), frozenset(lost)
        for move in moves:
            ranks = self._num_ranks
            self.overflow.settle(
                DiskReport({move.id: ranks}, {move.id: bad | gone}, {move.id: gone})
            )

    def fetch(self, request_id: str, *keys: bytes) -> Fetch:
        return self.overflow.fetches.begin(request_id, keys, [None] * len(keys))

    def check(self) -> None:
        """Nothing is held any more."""
        for tier in (self.host, self.disk):
            tier.index.check()
            assert tier.index.reserved == 0
            assert all(block.pins == 0 for block in tier.index)
        assert not self.overflow.pending
        assert self.overflow.fetches._room == self.overflow.fetches._most_held
