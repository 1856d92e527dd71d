"""Index: which block is in which slot of a tier, and which slots are free. Scheduler side."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvortex.block import Block, State
from kvortex.checksum import seed_of
from kvortex.prefix_tree import PrefixTree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, KeysView, Mapping

    from kvortex.core import BlockKey


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
        self._resident: dict[BlockKey, Block] = {}
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
        return self._resident.get(key)

    @property
    def keys(self) -> KeysView[BlockKey]:
        """The readable keys, as they are at any time."""
        return self._resident.keys()

    def __iter__(self) -> Iterator[Block]:
        return iter(self._resident.values())

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

    def adopt(self, slots: Mapping[BlockKey, int]) -> list[Block]:
        """Let free slots hold readable blocks that were there before this index; in that order."""
        taken = set(slots.values())
        self._free = [slot for slot in self._free if slot not in taken]
        blocks = []
        for key, slot in slots.items():
            self._orders += 1
            self._held += 1
            blocks.append(Block(key, slot, self._orders))
            self.publish(blocks[-1])
        return blocks

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
        self._tree.add(block, self._resident.get(block.parent or b""))

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

    def _free_if_unread(self, block: Block) -> None:
        if block.pins:
            return
        self._held -= 1
        if block.quarantined:
            self.num_slots -= 1
            self.quarantined += 1
            return
        if block.slot < self._opened:
            self._free.append(block.slot)
            return
        self.num_slots -= 1
        if block.slot < self._limit:
            self._closed.append(block.slot)

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
