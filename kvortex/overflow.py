"""Overflow: copies host blocks to disk ahead of their eviction, and back ahead of need.

Runs in vLLM's scheduler process, on its thread; the workers' disks hold the bytes.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvortex.block import State
from kvortex.core import DiskMove, DiskPlan, DiskReport
from kvortex.policies import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Sequence

    from kvortex.block import Block
    from kvortex.core import BlockKey
    from kvortex.metrics import Counters
    from kvortex.tiers import HostTier

WRITING_BYTES = 256 << 20
"""May be on their way to the disk at once, as far as an eighth of the host pool."""
WRITING_S = 1.0
"""Of writing at the speed that is allowed may be on its way at once; what is planned much further
ahead is refused by the worker's Pace, and may wait in the host instead."""
FETCHED_SHARE = 2
"""One over it is the share of the host pool that may be held for requests not scheduled yet."""
MOVE_BLOCKS = 32
"""Blocks that are read by one move: they become readable together."""
PATIENCE_S = 30.0
"""A move that takes longer is one of a drive that hangs; an idle engine does not wait for it."""
MEASURED_BYTES = 32 << 20
"""A fetch of less tells of latency, not of the disk's speed."""
WEIGHT = 0.2


@dataclass(slots=True, eq=False)
class _Flight:
    """A move that workers have not ended yet."""

    move: DiskMove
    in_host: list[Block]
    on_disk: list[Block]
    ranks_left: int
    began: float
    fetches: list[Fetch]
    """Those that wait for this read; none for a write."""
    failed: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    discard: bool = False
    """A read of what was forgotten meanwhile; of a write, the host's blocks tell that."""


@dataclass(slots=True, eq=False)
class Fetch:
    """What one request waits for."""

    began: float
    keys: set[BlockKey] = field(default_factory=set)
    read: int = 0
    """Blocks that were read for it, whoever else waited for them."""
    arrived: int = 0
    """Those, and what it needed of what was read for others."""
    moves_left: int = 0
    short: bool = False
    """The host had no room for all of it, and may have later."""
    held: dict[BlockKey, Block] = field(default_factory=dict)
    """Pinned in the host until the request has taken them, or will not."""
    released: bool = False

    @property
    def under_way(self) -> bool:
        """Whether some of it is still being read."""
        return self.moves_left > 0


class Overflow:
    """What RAM cannot hold.

    Every block that the disk's admission filter wants is written soon after it came to the host, so
    that it can leave the host at once when its slot is needed, and is there after a restart. What
    leaves before its turn to be written is lost, and counted. What several requests need is read
    once.

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
        self._read_bytes_per_s: float | None = None
        self.known = False
        """Whether the workers have told what is on their disks from a former life."""
        self.on_bad_read: Callable[[Block], None] | None = None
        """Told of each block that the disk did not give back."""
        self._host = host
        self._counters = counters
        self._num_ranks = num_ranks
        self._block_bytes = block_bytes
        self._waiting: dict[BlockKey, None] = {}
        """To be written, in order of their coming."""
        self._writing = 0
        slots = host.index.num_slots
        allowed = WRITING_BYTES
        if write_bytes_per_s is not None:
            allowed = min(allowed, int(write_bytes_per_s * WRITING_S))
        self._most_writing = max(1, min(slots // 8, allowed // max(1, block_bytes)))
        self._most_held = slots // FETCHED_SHARE
        self._holders: dict[Block, int] = {}
        """How many fetches hold a block."""
        self._promised = 0
        """Blocks that are being read, and will be held."""
        self._flights: dict[int, _Flight] = {}
        self._reading: dict[BlockKey, _Flight] = {}
        self._ids = itertools.count()
        self._fetches: dict[str, Fetch] = {}
        self._writes: list[DiskMove] = []
        self._reads: list[DiskMove] = []
        self._clear = False
        self._disowned = False
        host.on_evict = lambda block: self.miss((block.key,))

    @property
    def pending(self) -> bool:
        """Whether a move is planned or under way, or blocks wait to be written; not behind a drive
        that hangs, which may be for ever."""
        oldest = next(iter(self._flights.values()), None)
        if oldest is not None:
            return time.perf_counter() - oldest.began < PATIENCE_S
        return bool(self._waiting)

    @property
    def num_pending(self) -> int:
        """Moves planned or under way."""
        return len(self._flights)

    @property
    def read_bytes_per_s(self) -> float:
        """Of large fetches of late; 0 before the first."""
        return self._read_bytes_per_s or 0.0

    @property
    def readable(self) -> Container[BlockKey]:
        """The keys whose bytes are in the host or can be fetched, as they are at any time."""
        return _Union(self._host.readable, self.disk.readable)

    def read_seconds(self, num_blocks: int) -> float:
        """Time to bring so many blocks to the host, by what was measured; 0 before."""
        if self._read_bytes_per_s is None:
            return 0.0
        return num_blocks * self._block_bytes / self._read_bytes_per_s

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Count a use of the blocks of a request (see `HostTier.touch`)."""
        self.disk.touch(keys)
        for position, key in enumerate(keys):
            if self._host.lookup(key) is not None:
                self.consider(key, Place(position, len(keys)))

    def consider(self, key: BlockKey, place: Place) -> None:
        """A block is in the host, or on its way: have it written if that is worth it."""
        if key in self._waiting or self.disk.lookup(key) is not None or self.disk.is_arriving(key):
            return
        if self.disk.admits(key, place):
            self._waiting[key] = None
        else:
            self._counters.disk_not_admitted += 1

    def miss(self, keys: Iterable[BlockKey]) -> None:
        """Blocks leave the host, or did not come there after all."""
        for key in keys:
            if key in self._waiting:
                del self._waiting[key]
                self._counters.disk_missed_writes += 1

    def fetch_of(self, request_id: str) -> Fetch | None:
        """What was begun for a request."""
        return self._fetches.get(request_id)

    def fetch(
        self,
        request_id: str,
        keys: Sequence[BlockKey],
        parents: Sequence[BlockKey | None],
    ) -> Fetch:
        """Begin to bring blocks to the host for a request, or go on where there was no room.

        Those that are there already are held, too. What cannot be read is computed. Call `release`
        when the request has what it can have.
        """
        fetch = self._fetches.setdefault(request_id, Fetch(time.perf_counter()))
        fetch.keys.update(keys)
        fetch.short = False
        self._hold(fetch, [block for key in keys if (block := self._host.lookup(key)) is not None])
        rows = []
        for key, parent in zip(keys, parents, strict=True):
            if self._host.lookup(key) is not None:
                continue
            if (flight := self._reading.get(key)) is not None:
                self._join(fetch, flight)
            elif self.disk.lookup(key) is not None:
                rows.append((key, parent))
        for start in range(0, len(rows), MOVE_BLOCKS):
            if not self._read(fetch, rows[start : start + MOVE_BLOCKS]):
                break
        return fetch

    def release(self, request_id: str) -> None:
        """The request has taken what was fetched for it, or will not."""
        fetch = self._fetches.pop(request_id, None)
        if fetch is None:
            return
        fetch.released = True
        for block in fetch.held.values():
            others = self._holders.pop(block) - 1
            if others:
                self._holders[block] = others
        self._host.unpin(fetch.held.values())
        fetch.held.clear()

    def take_plan(self) -> DiskPlan | None:
        """What the workers shall move next; None if nothing."""
        self._write_some()
        if not (self._writes or self._reads or self._clear):
            return None
        plan = DiskPlan(tuple(self._writes), tuple(self._reads), self._clear)
        self._writes, self._reads, self._clear = [], [], False
        return plan

    def settle(self, report: DiskReport) -> None:
        """Take in what the workers moved, and at first what is on their disks."""
        if report.survivors is not None:
            self._adopt(report.survivors)
        if report.num_slots is not None:
            self.disk.index.limit(report.num_slots)
        for move_id, positions in report.failed.items():
            if move_id in self._flights:
                self._flights[move_id].failed |= positions
        for move_id, positions in report.lost.items():
            if move_id in self._flights:
                self._flights[move_id].lost |= positions
        for move_id, ranks in report.finished.items():
            flight = self._flights.get(move_id)
            if flight is None:
                continue
            flight.ranks_left -= ranks
            if flight.ranks_left <= 0:
                del self._flights[move_id]
                self._end(flight)

    def disown(self) -> None:
        """Nobody will ask for what a former life left on disk: its slots are free."""
        self._clear = self._disowned = True

    def reset(self) -> None:
        """Forget every block, also those that only wait or are under way, or were not heard of."""
        for flight in self._flights.values():
            flight.discard = True
        for request_id in list(self._fetches):
            self.release(request_id)
        self._reading.clear()
        self._waiting.clear()
        self.disk.clear()
        self._clear = True
        self._disowned = self._disowned or not self.known

    def _adopt(self, survivors: dict[BlockKey, int]) -> None:
        if not self.known and not self._disowned:
            self._counters.disk_survivors += len(survivors)
            self.disk.adopt(survivors)
        self.known = True

    @property
    def _room(self) -> int:
        """Host blocks that may yet be held."""
        return self._most_held - len(self._holders) - self._promised

    def _hold(self, fetch: Fetch, blocks: Iterable[Block]) -> None:
        """Keep blocks for a request, as long as not too many are kept for those that wait."""
        for block in blocks:
            if fetch.released or block.key in fetch.held:
                continue
            if block not in self._holders and self._room <= 0:
                fetch.short = True
                return
            self._holders[block] = self._holders.get(block, 0) + 1
            self._host.pin((block,))
            fetch.held[block.key] = block

    @staticmethod
    def _join(fetch: Fetch, flight: _Flight) -> None:
        """Wait for what is being read already."""
        if fetch not in flight.fetches:
            flight.fetches.append(fetch)
            fetch.moves_left += 1

    def _read(self, fetch: Fetch, rows: Sequence[tuple[BlockKey, BlockKey | None]]) -> bool:
        """Plan to read blocks; False if there is no room for more."""
        taken = rows[: max(0, self._room)]
        in_host = self._host.reserve([key for key, _ in taken], [parent for _, parent in taken])
        fetch.short = len(in_host) < len(rows)
        if not in_host:
            return False
        on_disk = [block for one in in_host if (block := self.disk.lookup(one.key)) is not None]
        assert len(on_disk) == len(in_host)
        self.disk.pin(on_disk)
        flight = self._fly(in_host, on_disk)
        self._reading.update((block.key, flight) for block in in_host)
        self._reads.append(flight.move)
        self._promised += len(in_host)
        self._join(fetch, flight)
        fetch.read += len(in_host)
        return not fetch.short

    def _write_some(self) -> None:
        """Plan to write what waits, as much as may be on its way at once."""
        if not self.known:  # a slot that looks free may hold a block of a former life
            return
        batch = self._take_waiting(self._most_writing - self._writing)
        on_disk = self.disk.reserve(
            [block.key for block in batch], [block.parent for block in batch]
        )
        self._counters.disk_missed_writes += len(batch) - len(on_disk)
        in_host = batch[: len(on_disk)]
        if not in_host:
            return
        self._host.pin(in_host)
        self._writing += len(in_host)
        self._writes.append(self._fly(in_host, on_disk).move)

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
            elif self.disk.lookup(key) is None:  # else it was found there since
                batch.append(block)
        return batch

    def _fly(self, in_host: list[Block], on_disk: list[Block]) -> _Flight:
        move = DiskMove(
            next(self._ids),
            tuple(block.key for block in in_host),
            np.fromiter((block.slot for block in in_host), np.int64, len(in_host)),
            np.fromiter((block.slot for block in on_disk), np.int64, len(on_disk)),
        )
        now = time.perf_counter()
        flight = _Flight(move, in_host, on_disk, self._num_ranks, now, [])
        self._flights[move.id] = flight
        return flight

    def _end(self, flight: _Flight) -> None:
        if flight.fetches:
            self._end_read(flight)
        else:
            self._end_write(flight)

    def _end_write(self, flight: _Flight) -> None:
        self._writing -= len(flight.in_host)
        unwanted = {n for n, one in enumerate(flight.in_host) if one.state is not State.RESIDENT}
        self._host.unpin(flight.in_host)
        good, bad = _parted(flight.on_disk, flight.failed | unwanted)
        self.disk.abort(bad)
        self.disk.commit(good)
        self._counters.disk_failed_writes += len(flight.failed)
        self._counters.disk_written_blocks += len(good)
        self._counters.disk_written_bytes += len(good) * self._block_bytes

    def _end_read(self, flight: _Flight) -> None:
        self._promised -= len(flight.in_host)
        for key in flight.move.keys:
            if self._reading.get(key) is flight:
                del self._reading[key]
        self.disk.unpin(flight.on_disk)
        everything = set(range(len(flight.in_host)))
        good, bad = _parted(flight.in_host, everything if flight.discard else flight.failed)
        self._host.abort(bad)
        self._host.commit(good)
        lost = [flight.on_disk[position] for position in flight.lost]
        self.disk.forget(lost)
        if self.on_bad_read is not None:
            for block in lost:
                self.on_bad_read(block)
        self._counters.disk_failed_reads += 0 if flight.discard else len(bad)
        self._counters.disk_read_blocks += len(good)
        self._counters.disk_read_bytes += len(good) * self._block_bytes
        flight.fetches[0].read -= len(bad)  # that for which it was read
        for fetch in flight.fetches:
            self._arrive(fetch, [block for block in good if block.key in fetch.keys])

    def _arrive(self, fetch: Fetch, blocks: Sequence[Block]) -> None:
        self._hold(fetch, [block for block in blocks if block.state is State.RESIDENT])
        fetch.arrived += len(blocks)
        fetch.moves_left -= 1
        if not fetch.moves_left and fetch.read:
            self._learn(fetch)

    def _learn(self, fetch: Fetch) -> None:
        """The disk's speed, from a fetch that ended."""
        nbytes = fetch.read * self._block_bytes
        seconds = time.perf_counter() - fetch.began
        self._counters.disk_read_seconds += seconds
        if nbytes < MEASURED_BYTES:
            return
        before = self._read_bytes_per_s or nbytes / seconds
        self._read_bytes_per_s = before + WEIGHT * (nbytes / seconds - before)


@dataclass(frozen=True, slots=True)
class _Union:
    """What is in one container or the other."""

    one: Container[BlockKey]
    other: Container[BlockKey]

    def __contains__(self, key: object) -> bool:
        return key in self.one or key in self.other


def _parted(blocks: Sequence[Block], bad: set[int]) -> tuple[list[Block], list[Block]]:
    """Those whose bytes arrived and are still wanted, and the others."""
    return (
        [block for position, block in enumerate(blocks) if position not in bad],
        [block for position, block in enumerate(blocks) if position in bad],
    )
