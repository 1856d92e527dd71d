"""HostTier: the rules by which blocks enter, serve and leave the host pool. Scheduler side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvortex.guarded_policy import GuardedPolicy
from kvortex.index import Block, Index, State
from kvortex.policies import Always

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

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
    """

    def __init__(
        self, num_slots: int, policy: EvictionPolicy, admission: AdmissionFilter | None = None
    ) -> None:
        self.index = Index(num_slots)
        self.evictions = 0
        self._policy = GuardedPolicy(policy, self.index.keys)
        self._admission = admission or Always(num_slots)
        self._arriving: dict[BlockKey, _Arrivals] = {}

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
            if self.index.get(key) is not None:
                self._admission.hit(key)
                self._policy.hit(key)

    def admits(self, key: BlockKey, place: Place) -> bool:
        """Whether a block that is not here is worth storing; counts as a use of it.

        A free slot is taken by whatever comes: to leave it empty serves nobody.
        """
        return self._admission.admit(key, place) or self.index.free > 0

    def reserve(self, keys: Iterable[BlockKey]) -> list[Block]:
        """Promise a slot to as many leading keys as slots can be had for, evicting as needed."""
        blocks = []
        for key in keys:
            self._policy.expect(key)
            if not self.index.free and not self._evict_one():
                break
            blocks.append(self.index.reserve(key))
            self._arriving.setdefault(key, _Arrivals()).count += 1
        return blocks

    def commit(self, blocks: Sequence[Block]) -> None:
        """The bytes are there: the keys become readable, the last first (see `touch`)."""
        for block in reversed(blocks):
            arrivals = self._arrived(block)
            if block.order < arrivals.newest:
                self.index.forget(block)
                continue
            arrivals.newest = block.order
            older = self.index.get(block.key)
            if older is None:
                self.index.publish(block)
                self._policy.insert(block.key)
            else:
                self.index.forget(older)
                self.index.publish(block)
                self._policy.hit(block.key)

    def abort(self, blocks: Iterable[Block]) -> None:
        """The bytes did not arrive: the slots are free again."""
        for block in blocks:
            self._arrived(block)
            self.index.forget(block)

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
                self._policy.remove(block.key)
                self.index.forget(block)

    def clear(self) -> None:
        """Forget every readable block."""
        self.forget(list(self.index))

    def _evict_one(self) -> bool:
        victim = self._policy.evict(self._is_pinned)
        if victim is None:
            return False
        block = self.index.get(victim)
        assert block is not None
        self.index.forget(block)
        self.evictions += 1
        return True

    def _is_pinned(self, key: BlockKey) -> bool:
        block = self.index.get(key)
        return block is not None and block.pins > 0

    def _arrived(self, block: Block) -> _Arrivals:
        arrivals = self._arriving[block.key]
        arrivals.count -= 1
        if not arrivals.count:
            del self._arriving[block.key]
        return arrivals
