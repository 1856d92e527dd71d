"""Fetches: has blocks brought from disk to the host for requests that wait, ahead of their need.

Runs in vLLM's scheduler process, on its thread; the workers' disks give the bytes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvortex.block import State
from kvortex.moves_under_way import MovesUnderWay, MoveUnderWay, parted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kvortex.block import Block
    from kvortex.core import BlockKey, DiskMove, DiskReport
    from kvortex.metrics import Counters
    from kvortex.tiers import HostTier

HELD_SHARE = 2
"""One over it is the share of the host pool that may be held for requests not scheduled yet."""
MOVE_BLOCKS = 32
"""Blocks that are read by one move: they become readable together."""
MEASURED_BYTES = 32 << 20
"""A fetch of less tells of latency, not of the disk's speed."""
WEIGHT = 0.2


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


@dataclass(slots=True, eq=False)
class Read(MoveUnderWay):
    """A move from disk to the host."""

    fetches: list[Fetch] = field(default_factory=list)
    """Those that wait for it."""
    discard: bool = False
    """What it brings was forgotten meanwhile."""


class Fetches:
    """What was begun for each request. What several need is read once.

    Args:
        host: the tier of the host pool.
        disk: the tier of the disk's slots.
        counters: where reads are counted.
        ids: unique among the moves of both directions.
        num_ranks: whose disks hold a part of each block.
        block_bytes: of a block, on all ranks.
    """

    def __init__(
        self,
        host: HostTier,
        disk: HostTier,
        counters: Counters,
        ids: Iterator[int],
        num_ranks: int,
        block_bytes: int,
    ) -> None:
        self.under_way = MovesUnderWay(Read, ids, num_ranks)
        self.on_bad_read: Callable[[Block], None] = _nobody
        """Told of each block that the disk does not have any more, or cannot give back."""
        self._bytes_per_s: float | None = None
        self._host = host
        self._disk = disk
        self._counters = counters
        self._block_bytes = block_bytes
        self._most_held = host.index.num_slots // HELD_SHARE
        self._holders: dict[Block, int] = {}
        """How many fetches hold a block."""
        self._promised = 0
        """Blocks that are being read, and will be held."""
        self._reading: dict[BlockKey, Read] = {}
        self._fetches: dict[str, Fetch] = {}

    @property
    def bytes_per_s(self) -> float:
        """Of large fetches of late; 0 before the first."""
        return self._bytes_per_s or 0.0

    def seconds(self, num_blocks: int) -> float:
        """Time to bring so many blocks to the host, by what was measured; 0 before."""
        if self._bytes_per_s is None:
            return 0.0
        return num_blocks * self._block_bytes / self._bytes_per_s

    def of(self, request_id: str) -> Fetch | None:
        """What was begun for a request."""
        return self._fetches.get(request_id)

    def begin(
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
            if (read := self._reading.get(key)) is not None:
                self._join(fetch, read)
            elif self._disk.lookup(key) is not None:
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

    def take(self) -> tuple[DiskMove, ...]:
        """What to read next."""
        return self.under_way.take_new()

    def settle(self, report: DiskReport) -> None:
        """What every rank has read is in the host."""
        for read in self.under_way.settle(report):
            self._end(read)

    def distrust(self, key: BlockKey) -> None:
        """What is being read of a key is not to be served."""
        if (read := self._reading.get(key)) is not None:
            position = read.move.keys.index(key)
            read.failed.add(position)
            read.lost.add(position)

    def reset(self) -> None:
        """Release every request, and discard what is being read."""
        for read in self.under_way:
            read.discard = True
        for request_id in list(self._fetches):
            self.release(request_id)
        self._reading.clear()

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
    def _join(fetch: Fetch, read: Read) -> None:
        """Wait for what is being read already."""
        if fetch not in read.fetches:
            read.fetches.append(fetch)
            fetch.moves_left += 1

    def _read(self, fetch: Fetch, rows: Sequence[tuple[BlockKey, BlockKey | None]]) -> bool:
        """Plan to read blocks; False if there is no room for more."""
        taken = rows[: max(0, self._room)]
        in_host = self._host.reserve([key for key, _ in taken], [parent for _, parent in taken])
        fetch.short = len(in_host) < len(rows)
        if not in_host:
            return False
        on_disk = [block for one in in_host if (block := self._disk.lookup(one.key)) is not None]
        assert len(on_disk) == len(in_host)
        self._disk.pin(on_disk)
        read = self.under_way.begin(in_host, on_disk)
        self._reading.update((block.key, read) for block in in_host)
        self._promised += len(in_host)
        self._join(fetch, read)
        fetch.read += len(in_host)
        return not fetch.short

    def _end(self, read: Read) -> None:
        self._promised -= len(read.in_host)
        for key in read.move.keys:
            if self._reading.get(key) is read:
                del self._reading[key]
        self._disk.unpin(read.on_disk)
        everything = set(range(len(read.in_host)))
        good, bad = parted(read.in_host, everything if read.discard else read.failed)
        self._host.abort(bad)
        for block in good:
            block.from_disk = True
        self._host.commit(good)
        self._disk.forget(read.on_disk[position] for position in read.lost)
        if not read.discard:
            lost = [read.in_host[position] for position in sorted(read.lost)]
            self._counters.disk_failed_reads += len(lost)
            for block in lost:  # the others are there, and came too late
                self.on_bad_read(block)
        self._counters.disk_read_blocks += len(good)
        self._counters.disk_read_bytes += len(good) * self._block_bytes
        read.fetches[0].read -= len(bad)  # that for which it was read
        for fetch in read.fetches:
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
        before = self._bytes_per_s or nbytes / seconds
        self._bytes_per_s = before + WEIGHT * (nbytes / seconds - before)


def _nobody(_block: Block) -> None:
    """Listens."""
