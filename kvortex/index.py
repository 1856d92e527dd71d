"""Index: which block is in which slot of a tier, and which slots are free. Scheduler side."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

from kvortex.block import Block, State
from kvortex.checksum import seed_of
from kvortex.prefix_tree import PrefixTree

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, KeysView, Sequence

    from kvortex.core import BlockKey

BATCH = 1 << 10
"""Blocks that are adopted at once, in about a millisecond."""
SCANNED = 1 << 14
"""Slots that are looked at at once, in about a millisecond."""


class Index:
    """Slots, numbered from 0, and the blocks that hold them; `num_slots` are in use or free.

    A key is readable exactly while its block is RESIDENT. Reserved blocks are not in the map, so
    a key may be stored anew while its older bytes are still being read.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.quarantined = 0
        """Slots that nobody gets any more: their bytes changed."""
        self.on_change: Callable[[BlockKey, bool], None] = _nobody
        """Told of each key that becomes readable, and of each that no longer is."""
        self._limit = num_slots
        self._opened = num_slots
        self._closed: list[int] = []
        """Slots that nobody holds and that are not given out yet."""
        self._free = list(range(num_slots - 1, -1, -1))
        self._resident: dict[BlockKey, Block | int] = {}
        """Of an adopted key whose block nobody has asked for, its slot: a million objects take
        seconds to make, and lengthen each full collection of garbage."""
        self._held = 0
        self._orders = 0
        self._tree = PrefixTree()

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    @property
    def resident(self) -> int:
        """Slots whose block is readable."""
        return len(self._resident)

    @property
    def reserved(self) -> int:
        """Slots promised to a store, or kept for the last reader of a block already forgotten."""
        return self._held

    def get(self, key: BlockKey) -> Block | None:
        """The readable block of a key."""
        found = self._resident.get(key)
        return self._made(key, found) if isinstance(found, int) else found

    @property
    def keys(self) -> KeysView[BlockKey]:
        """The readable keys, as they are at any time."""
        return self._resident.keys()

    def __iter__(self) -> Iterator[Block]:
        for key, found in self._resident.items():
            yield self._made(key, found) if isinstance(found, int) else found

    def limit(self, num_slots: int) -> None:
        """There is no slot from `num_slots` on; those in use leave with their holder."""
        self._limit = min(self._limit, num_slots)
        self.open(self._opened)

    def open(self, num_slots: int) -> None:
        """Give out no slot from `num_slots` on until more are opened; at first all are."""
        self._opened = min(num_slots, self._limit)
        idle = [slot for slot in (*self._closed, *self._free) if slot < self._limit]
        self.num_slots -= len(self._free)
        self._closed = [slot for slot in idle if slot >= self._opened]
        self._free = [slot for slot in idle if slot < self._opened]
        self.num_slots += len(self._free)

    def adopt(self, rows: Sequence[tuple[BlockKey, int]]) -> Generator[list[BlockKey]]:
        """Let free slots hold readable blocks that were there before this index; in that order.

        A batch at a time: yields the keys that became readable. At first the slots are set aside,
        which are looked for among the free ones, and no key is yielded; until then nothing else may
        change here. Closed before its end, it gives back the slots of the rest.
        """
        yield from self._set_aside(rows)
        left = iter(rows)
        try:
            while batch := list(itertools.islice(left, BATCH)):
                yield self._adopt(batch)
        finally:
            for _, slot in left:
                self._give_back(slot)

    def reserve(self, key: BlockKey, parent: BlockKey | None = None) -> Block:
        """Give a free slot to a block that shall hold `key`, which follows `parent`."""
        self._orders += 1
        seed = seed_of(key)
        block = Block(key, self._free.pop(), self._orders, parent=parent, seed=seed)
        self._held += 1
        return block

    def publish(self, block: Block) -> None:
        """Make a reserved block the readable one of its key; the key must have none."""
        assert block.state is State.RESERVED
        assert block.key not in self._resident
        self._held -= 1
        block.state = State.RESIDENT
        block.since = time.monotonic()
        self._resident[block.key] = block
        self.on_change(block.key, True)
        self._tree.add(block, self.get(block.parent or b""))

    def orphans(self, parent: BlockKey) -> Iterator[Block]:
        """The readable blocks that follow a key which is not readable."""
        return self._tree.orphans(parent)

    def forget(self, block: Block) -> None:
        """Stop a block from being readable; its slot is free once nobody reads it."""
        if block.state is State.RESIDENT:
            del self._resident[block.key]
            self.on_change(block.key, False)
            self._tree.remove(block)
            self._held += 1
        block.state = State.CONDEMNED
        self._free_if_unread(block)

    def pin(self, block: Block) -> None:
        """Keep a resident block's bytes where they are."""
        assert block.state is State.RESIDENT
        block.pins += 1

    def unpin(self, block: Block) -> None:
        """End one `pin`."""
        assert block.pins > 0
        block.pins -= 1
        if block.state is State.CONDEMNED:
            self._free_if_unread(block)

    def _set_aside(self, rows: Sequence[tuple[BlockKey, int]]) -> Iterator[list[BlockKey]]:
        taken, free = bytearray(self._limit), list[int]()
        for start in range(0, len(rows), SCANNED):
            for _, slot in rows[start : start + SCANNED]:
                taken[slot] = 1
            yield []
        for start in range(0, len(self._free), SCANNED):
            free += [slot for slot in self._free[start : start + SCANNED] if not taken[slot]]
            yield []
        self._held += len(rows)
        self._free = free

    def _adopt(self, rows: Sequence[tuple[BlockKey, int]]) -> list[BlockKey]:
        keys = [key for key, _ in rows]
        assert self._resident.keys().isdisjoint(keys)
        self._held -= len(rows)
        self._resident.update(rows)
        if self.on_change is not _nobody:
            for key in keys:
                self.on_change(key, True)
        if self._tree.has_orphans:
            for block in filter(None, map(self.get, keys)):
                self._tree.add(block, None)
        return keys

    def _made(self, key: BlockKey, slot: int) -> Block:
        """The block of an adopted key, when somebody asks for it first."""
        block = Block(key, slot, 0, State.RESIDENT)
        self._resident[key] = block
        return block

    def _free_if_unread(self, block: Block) -> None:
        if block.pins:
            return
        if block.quarantined:
            self._held -= 1
            self.num_slots -= 1
            self.quarantined += 1
            return
        self._give_back(block.slot)

    def _give_back(self, slot: int) -> None:
        """Nobody holds a slot any more."""
        self._held -= 1
        if slot < self._opened:
            self._free.append(slot)
            return
        self.num_slots -= 1
        if slot < self._limit:
            self._closed.append(slot)

    def check(self) -> None:
        """Assert the law of conservation and that no slot has two holders."""
        assert self.free + self.reserved + self.resident == self.num_slots
        assert self.num_slots + len(self._closed) + self.quarantined >= self._limit
        assert all(self._opened <= slot < self._limit for slot in self._closed)
        assert all(slot < self._opened for slot in self._free)
        slots = [*self._free, *self._closed, *(block.slot for block in self)]
        assert len(slots) == len(set(slots))
        assert all(block.state is State.RESIDENT for block in self)


def _nobody(_key: BlockKey, _readable: bool) -> None:
    """Listens."""
