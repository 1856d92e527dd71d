"""Overflow: the disk as the scheduler sees it, from the first report of it to a reset.

Runs in vLLM's scheduler process, on its thread; the workers' disks hold the bytes.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvortex.core import DiskPlan, DiskReport
from kvortex.fetches import Fetches
from kvortex.metrics import MissReason
from kvortex.write_behind import WriteBehind

if TYPE_CHECKING:
    from collections.abc import Container, Generator, Iterable, Sequence

    from kvortex.core import BlockKey
    from kvortex.metrics import Counters
    from kvortex.tiers import HostTier

ADOPT_S = 0.005
"""Of each plan and each report may go to what a former life left: there may be a million blocks."""
PATIENCE_S = 30.0
"""A move that takes longer is one of a drive that hangs; an idle engine does not wait for it."""


class Overflow:
    """What RAM cannot hold: writes behind and fetches ahead share one disk tier, plan and report.

    Args:
        host: the tier of the host pool.
        disk: the tier of the disk's slots; empty.
        counters: those that begin with `disk` are counted here.
        num_ranks: whose disks hold a part of each block.
        block_bytes: of a block, on all ranks.
        write_bytes_per_s: that all ranks together may write; None is no limit.
    """

    def __init__(
        self,
        host: HostTier,
        disk: HostTier,
        counters: Counters,
        num_ranks: int = 1,
        block_bytes: int = 0,
        write_bytes_per_s: float | None = None,
    ) -> None:
        self.disk = disk
        self.known = False
        """Whether the workers have told what is on their disks from a former life, and all of it
        has been taken in."""
        self._adopting: Generator[None] | None = None
        ids = itertools.count()
        self.write_behind = WriteBehind(
            host, disk, counters, ids, num_ranks, block_bytes, write_bytes_per_s
        )
        self.fetches = Fetches(host, disk, counters, ids, num_ranks, block_bytes)
        self.reading_off = 0
        """Ranks whose drive is not read for now, as it fails: then nothing is worth a fetch."""
        self.writing_off = 0
        """Those whose drive is not written: a write would only cost the block in its slot."""
        self._host = host
        self._counters = counters
        self._clear = False
        self._disowned = False
        self._erases: list[int] = []

    @property
    def pending(self) -> bool:
        """Whether a move is planned or under way, or blocks wait for the disk; not behind a drive
        that hangs, which may be for ever."""
        moves = itertools.chain(self.write_behind.under_way, self.fetches.under_way)
        oldest = min((move.began for move in moves), default=None)
        if self._adopting is not None:
            return True
        if oldest is not None:
            return time.perf_counter() - oldest < PATIENCE_S
        return bool(self._erases) or (self.write_behind.waits and not self.writing_off)

    @property
    def num_pending(self) -> int:
        """Moves planned or under way."""
        return len(self.write_behind.under_way) + len(self.fetches.under_way)

    @property
    def readable(self) -> Container[BlockKey]:
        """The keys whose bytes are in the host or can be fetched, as they are at any time."""
        return _Union(self._host.readable, self.disk.readable)

    def why_not_fetched(self, key: BlockKey) -> MissReason | None:
        """Of a key that is on disk, or may be, as nobody knows yet; None of others."""
        if self.known and self.disk.lookup(key) is None:
            return None
        return MissReason.FAILED if self.reading_off else MissReason.LATE

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Count a use of the blocks of a request (see `HostTier.touch`)."""
        self.disk.touch(keys)
        self.write_behind.touch(keys)

    def take_plan(self) -> DiskPlan | None:
        """What the workers shall move next; None if nothing."""
        self._adopt_more()
        # Before it is known, a slot that looks free may hold a block of a former life.
        writes = self.write_behind.take() if self.known and not self.writing_off else ()
        reads = self.fetches.take()
        clear, self._clear = self._clear, False
        erases, self._erases = tuple(self._erases), []
        plan = DiskPlan(writes, reads, clear, erases)
        return plan if writes or reads or clear or erases else None

    def settle(self, report: DiskReport) -> None:
        """Take in what the workers moved, and at first what is on their disks."""
        if report.num_slots is not None:
            self.disk.index.limit(report.num_slots)
        if report.survivors is not None:
            self._adopt(report.survivors)
        else:
            self._adopt_more()
        self._counters.count_disks(report.counted)
        self.reading_off += report.reading_off
        self.writing_off += report.writing_off
        self._erases += self.write_behind.settle(report)
        self.fetches.settle(report)

    def distrust(self, keys: Iterable[BlockKey]) -> None:
        """What was loaded of these was not what was stored: have the disk forget them, also for its
        next life; what is being written, as soon as that has ended."""
        for key in keys:
            block = self.disk.lookup(key)
            if block is not None:
                self._erases.append(block.slot)
                self.disk.forget((block,))
            self.fetches.distrust(key)
            known = self.write_behind.distrust(key) or block is not None
            self._counters.disk_distrusted_blocks += known

    def disown(self) -> None:
        """Nobody will ask for what a former life left on disk: its slots are free."""
        self._clear = self._disowned = True

    def reset(self) -> None:
        """Forget every block, also those that only wait or are under way, or were not heard of."""
        if self._adopting is not None:
            self._adopting.close()
            self._adopting, self.known = None, True
        self.fetches.reset()
        self.write_behind.reset()
        self.disk.clear()
        self._erases.clear()
        self._clear = True
        self._disowned = self._disowned or not self.known

    def _adopt(self, survivors: dict[BlockKey, int]) -> None:
        if self.known or self._adopting is not None:
            return
        if self._disowned:
            self.known = True
            return
        self._counters.disk_survivors += len(survivors)
        self._adopting = self.disk.adopt(survivors)
        self._adopt_more()

    def _adopt_more(self) -> None:
        """Go on for a moment; no step of the engine waits for all of it."""
        if self._adopting is None:
            return
        until = time.monotonic() + ADOPT_S
        for _ in self._adopting:
            if time.monotonic() > until:
                return
        self._adopting, self.known = None, True


@dataclass(frozen=True, slots=True)
class _Union:
    """What is in one container or the other."""

    one: Container[BlockKey]
    other: Container[BlockKey]

    def __contains__(self, key: object) -> bool:
        return key in self.one or key in self.other
