"""HostTier: the rules by which blocks enter, serve and leave the host pool. Scheduler side."""

from __future__ import annotations

import itertools
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvortex.block import Block, State
from kvortex.guarded_policy import GuardedPolicy
from kvortex.index import SCANNED, Index
from kvortex.policies import Always

if TYPE_CHECKING:
    from collections.abc import (
        Callable,
        Container,
        Generator,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    from kvortex.core import BlockKey
    from kvortex.policies import AdmissionFilter, EvictionPolicy, Place


@dataclass(slots=True)
class _Arrivals:
    """The stores of one key that are under way."""

    count: int = 0
    newest: int = 0
    """Order of the newest one that arrived; older ones are stale, even once it was evicted."""


class HostTier:
    """Blocks in host RAM: reserve, then commit or abort; pin while a transfer reads.

    The policy knows exactly the readable keys. A pinned block is never a victim.

    Where the key before each key is told, the tail of a request leaves first, whatever the policy:
    a victim that others continue waits until they have left, the last first, and is in the policy
    again if it is used meanwhile. Blocks whose prefix is gone for good leave before all others.
    """

    def __init__(
        self,
        num_slots: int,
        policy: EvictionPolicy,
        admission: AdmissionFilter | None = None,
    ) -> None:
        self.index = Index(num_slots)
        self.evictions = 0
        self.on_evict: list[Callable[[Block], None]] = []
        """All are told of each victim while its bytes are still there."""
        self.suspects: dict[int, Block] = {}
        """The first block that was found to be wrong in a slot, if it came from disk."""
        self._policy = GuardedPolicy(policy, self.index.keys)
        self._admission = admission or Always(num_slots)
        self._arriving: dict[BlockKey, _Arrivals] = {}
        self._path: list[Block] = []
        """From the victim that the policy named last down to the block that leaves next."""
        self._orphans: list[Block] = []
        """Blocks that had no prefix when they came, or lost it; looked at again before use."""
        self._spared: dict[BlockKey, None] = {}
        """Victims that cannot leave because a transfer reads what continues them."""

    @property
    def policy_error(self) -> str | None:
        """Why LRU took the policy's place, if it did."""
        return self._policy.replaced

    def lookup(self, key: BlockKey) -> Block | None:
        """The readable block of a key; does not count as a use."""
        return self.index.get(key)

    @property
    def readable(self) -> Container[BlockKey]:
        """The readable keys, as they are at any time."""
        return self.index.keys

    def is_arriving(self, key: BlockKey) -> bool:
        """Whether a store of the key is under way."""
        return key in self._arriving

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Count a use of each readable key, the last first, so that a prefix outlives its tail."""
        for key in reversed(keys):
            block = self.index.get(key)
            if block is None:
                continue
            self._admission.hit(key)
            if self._is_leaving(block):
                self._path.clear()
                self._policy.insert(key)
            else:
                self._policy.hit(key)

    def admits(self, key: BlockKey, place: Place) -> bool:
        """Whether a block that is not here is worth storing; counts as a use of it.

        A free slot is taken by whatever comes: to leave it empty serves nobody.
        """
        return self._admission.admit(key, place) or self.index.free > 0

    def reserve(
        self, keys: Sequence[BlockKey], parents: Sequence[BlockKey | None] | None = None
    ) -> list[Block]:
        """Promise a slot to as many leading keys as slots can be had for, evicting as needed.

        Args:
            keys: any, in order of their worth.
            parents: for each the key before it in its request, None for a first block; to be left
                out where blocks are of use without those before them.
        """
        for key in keys:
            self._arriving.setdefault(key, _Arrivals()).count += 1
        blocks: list[Block] = []
        for key, parent in zip(keys, parents or [None] * len(keys), strict=True):
            older = self.index.get(key)
            if older is None or self._is_leaving(older):
                self._policy.expect(key)
            if not self.index.free and not self._evict_one():
                break
            blocks.append(self.index.reserve(key, parent))
        for key in keys[len(blocks) :]:
            self._arrived(key)
        return blocks

    def adopt(self, slots: Mapping[BlockKey, int]) -> Generator[None]:
        """Blocks that were in this tier in a former life, the oldest first, are readable again.

        A batch whenever it is asked for the next; until its end nothing may be reserved. Closed
        before that, it leaves the rest.
        """
        here, items = self.index, iter(slots.items())
        rows: list[tuple[BlockKey, int]] = []
        while some := list(itertools.islice(items, SCANNED)):
            rows += [
                (key, slot)
                for key, slot in some
                if 0 <= slot < here.num_slots
                and here.get(key) is None
                and key not in self._arriving
            ]
            yield
        with closing(here.adopt(rows)) as adopted:
            for keys in adopted:
                self._policy.insert_all(keys)
                yield

    def commit(self, blocks: Sequence[Block]) -> None:
        """The bytes are there: the keys become readable, the last first (see `touch`)."""
        for block in reversed(blocks):
            arrivals = self._arrived(block.key)
            if block.order < arrivals.newest:
                self.index.forget(block)
                continue
            arrivals.newest = block.order
            older = self.index.get(block.key)
            if older is None:
                self.index.publish(block)
                self._policy.insert(block.key)
            else:
                self._replace(older, block)
        self._orphans += self._without_prefix(blocks)

    def abort(self, blocks: Iterable[Block]) -> None:
        """The bytes did not arrive: the slots are free again."""
        for block in blocks:
            self._arrived(block.key)
            self.index.forget(block)
            self._orphans += self._without_prefix(self.index.orphans(block.key))

    def pin(self, blocks: Iterable[Block]) -> None:
        """Keep readable blocks in place until as many `unpin`s."""
        for block in blocks:
            self.index.pin(block)

    def unpin(self, blocks: Iterable[Block]) -> None:
        """A transfer no longer reads these blocks."""
        for block in blocks:
            self.index.unpin(block)

    def forget(self, blocks: Iterable[Block]) -> None:
        """Drop blocks whose bytes cannot be trusted, if they are still readable."""
        for block in blocks:
            if block.state is State.RESIDENT:
                self._drop(block)
                self._orphans += self._without_prefix(self.index.orphans(block.key))

    def quarantine(self, blocks: Iterable[Block]) -> None:
        """Drop blocks whose bytes changed where they were, and use their slots no more.

        Bytes that came from disk may have been wrong when they came: their slot is given up if
        another block is found to be wrong there, or a failing drive would cost all of the memory.
        """
        for block in blocks:
            if block.quarantined:  # another reader has told of it
                continue
            if not block.from_disk or self.suspects.setdefault(block.slot, block) is not block:
                block.quarantined = True
                self.suspects.pop(block.slot, None)
            self.forget((block,))

    def clear(self) -> None:
        """Forget every readable block."""
        self.forget(list(self.index))

    def _replace(self, older: Block, block: Block) -> None:
        """New bytes for a key that is readable."""
        leaving = self._is_leaving(older)
        self.index.forget(older)
        self.index.publish(block)
        if leaving:
            self._path.clear()
            self._policy.insert(block.key)
        else:
            self._policy.hit(block.key)

    def _evict_one(self) -> bool:
        block = self._next_to_leave()
        for key in self._spared:
            self._policy.insert(key)
        self._spared.clear()
        if block is None:
            return False
        for tell in self.on_evict:
            tell(block)
        self._drop(block)
        self.evictions += 1
        return True

    def _next_to_leave(self) -> Block | None:
        while self._path or self._name_victim():
            below = self._path[-1].below
            while below is not None and below is not self._path[0]:  # that would be a circle
                self._path.append(below)
                below = below.below
            block = self._path[-1]
            if block.state is State.RESIDENT and not block.pins:
                return block
            if block.state is State.RESIDENT:
                self._spared[self._path[0].key] = None
                self._path.clear()
            else:
                self._path.pop()
        return None

    def _name_victim(self) -> bool:
        """Begin a path with an orphan, or with what the policy names; False if there is nothing."""
        while self._orphans:
            block = next(self._without_prefix([self._orphans.pop()]), None)
            if block is not None and not block.pins:
                self._policy.remove(block.key)
                self._path.append(block)
                return True
        victim = self._policy.evict(self._is_pinned)
        block = None if victim is None else self.index.get(victim)
        if block is not None:
            self._path.append(block)
        return block is not None

    def _drop(self, block: Block) -> None:
        """A readable block is no more."""
        if self._is_leaving(block):
            self._path.clear()
        else:
            self._policy.remove(block.key)
        self.index.forget(block)

    def _is_leaving(self, block: Block) -> bool:
        """Whether the policy named it already: all other readable blocks it knows."""
        return bool(self._path) and block is self._path[0]

    def _without_prefix(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Those whose prefix is neither readable nor arriving."""
        for block in blocks:
            parent = block.parent
            lonely = block.state is State.RESIDENT and parent is not None and block.above is None
            if lonely and parent not in self._arriving:
                yield block

    def _is_pinned(self, key: BlockKey) -> bool:
        block = self.index.get(key)
        return block is not None and (block.pins > 0 or key in self._spared)

    def _arrived(self, key: BlockKey) -> _Arrivals:
        arrivals = self._arriving[key]
        arrivals.count -= 1
        if not arrivals.count:
            del self._arriving[key]
        return arrivals
