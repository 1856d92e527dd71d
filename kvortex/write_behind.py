"""WriteBehind: has host blocks copied to disk ahead of their eviction.

Runs in vLLM's scheduler process, on its thread; the workers' disks take the bytes.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvortex.block import State
from kvortex.disk.pace import Pace
from kvortex.moves_under_way import MovesUnderWay, MoveUnderWay, parted
from kvortex.policies import Place

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kvortex.block import Block
    from kvortex.core import BlockKey, DiskMove, DiskReport
    from kvortex.metrics import Counters
    from kvortex.tiers import HostTier

WRITING_BYTES = 256 << 20
"""May be on their way to the disk at once, as far as an eighth of the host pool."""
WRITING_S = 1.0
"""Of writing at the speed that is allowed may be on its way at once, and one block: what is planned
much further ahead is refused by the worker's Pace, and waits in the host instead."""


@dataclass(slots=True, eq=False)
class Write(MoveUnderWay):
    """A move from the host to disk."""

    distrusted: set[int] = field(default_factory=set)
    """Positions of what must not stay there."""


class WriteBehind:
    """What waits to be written, in order of its coming, and what is being written.

    Every block that the disk's admission filter wants is written soon after it came to the host, so
    that it can leave the host at once when its slot is needed, and is there after a restart. What
    leaves before its turn to be written is lost, and counted.

    Args:
        host: the tier of the host pool.
        disk: the tier of the disk's slots.
        counters: where writes are counted.
        ids: unique among the moves of both directions.
        num_ranks: whose disks hold a part of each block.
        block_bytes: of a block, on all ranks.
        bytes_per_s: that all ranks together may write; None is no limit.
    """

    def __init__(
        self,
        host: HostTier,
        disk: HostTier,
        counters: Counters,
        ids: Iterator[int],
        num_ranks: int,
        block_bytes: int,
        bytes_per_s: float | None,
    ) -> None:
        self.under_way = MovesUnderWay(Write, ids, num_ranks)
        self._host = host
        self._disk = disk
        self._counters = counters
        self._block_bytes = block_bytes
        self._waiting: dict[BlockKey, None] = {}
        self._writing = 0
        self._pace = Pace(bytes_per_s)
        allowed = WRITING_BYTES
        if bytes_per_s is not None:
            allowed = min(allowed, int(bytes_per_s * WRITING_S))
        slots = host.index.num_slots
        self._most_writing = max(1, min(slots // 8, allowed // max(1, block_bytes)))
        host.on_evict.append(lambda block: self.miss((block.key,)))

    @property
    def waits(self) -> bool:
        """Whether a block has yet to be written."""
        return bool(self._waiting)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """The blocks of a request are used: those in the host may have become worth a write."""
        for position, key in enumerate(keys):
            if self._host.lookup(key) is not None:
                self.consider(key, Place(position, len(keys)))

    def consider(self, key: BlockKey, place: Place) -> None:
        """A block is in the host, or on its way: have it written if that is worth it."""
        if (
            key in self._waiting
            or self._disk.lookup(key) is not None
            or self._disk.is_arriving(key)
        ):
            return
        if self._disk.admits(key, place):
            self._waiting[key] = None
        else:
            self._counters.disk_not_admitted += 1

    def miss(self, keys: Iterable[BlockKey]) -> None:
        """Blocks leave the host, or did not come there after all."""
        for key in keys:
            if key in self._waiting:
                del self._waiting[key]
                self._counters.disk_missed_writes += 1

    def take(self) -> tuple[DiskMove, ...]:
        """What to write next: as much as may be on its way at once, and no faster than allowed."""
        now = time.monotonic()
        room = self._pace.room(self._block_bytes, now, WRITING_S)
        batch = self._take_waiting(min(room, self._most_writing - self._writing))
        on_disk = self._disk.reserve(
            [block.key for block in batch], [block.parent for block in batch]
        )
        self._counters.disk_missed_writes += len(batch) - len(on_disk)
        in_host = batch[: len(on_disk)]
        if in_host:
            self._host.pin(in_host)
            self._writing += len(in_host)
            self._pace.appoint(len(in_host) * self._block_bytes, now)
            self.under_way.begin(in_host, on_disk)
        return self.under_way.take_new()

    def settle(self, report: DiskReport) -> list[int]:
        """What every rank has written is on disk; returns slots there that are to be erased."""
        return [slot for write in self.under_way.settle(report) for slot in self._end(write)]

    def distrust(self, key: BlockKey) -> bool:
        """What is being written of a key must not stay on disk; returns whether it is written."""
        for write in self.under_way:
            if key in write.move.keys:
                write.distrusted.add(write.move.keys.index(key))
                return True
        return False

    def reset(self) -> None:
        """Forget what waits; of what is being written the host's blocks tell that it is void."""
        self._waiting.clear()

    def _take_waiting(self, room: int) -> list[Block]:
        """The blocks that are written next; those that are only arriving go on waiting."""
        batch: list[Block] = []
        for key in list(itertools.islice(self._waiting, max(0, 2 * room))):
            if len(batch) == room:
                break
            block = self._host.lookup(key)
            if block is None and self._host.is_arriving(key):
                continue
            del self._waiting[key]
            if block is None:
                self._counters.disk_missed_writes += 1
            elif self._disk.lookup(key) is None:  # else it was found there since
                batch.append(block)
        return batch

    def _end(self, write: Write) -> list[int]:
        self._pace.hear(self._writing * self._block_bytes, time.monotonic())
        self._writing -= len(write.in_host)
        unwanted = {n for n, one in enumerate(write.in_host) if one.state is not State.RESIDENT}
        self._host.unpin(write.in_host)
        good, bad = parted(write.on_disk, write.failed | unwanted | write.distrusted)
        self._disk.abort(bad)
        self._disk.commit(good)
        self._counters.disk_failed_writes += len(write.lost)
        self._counters.disk_written_blocks += len(good)
        self._counters.disk_written_bytes += len(good) * self._block_bytes
        return [write.on_disk[position].slot for position in write.distrusted]
