"""EvictionPolicy: what a tier asks of the object that chooses its victims."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class EvictionPolicy(ABC):
    """Orders the keys of one tier; called from one thread only.

    A policy sees keys, never bytes. Pinning belongs to the tier: a policy is told which keys it
    may not choose at the moment it has to choose. A factory registered in the entry-point group
    `kvortex.policies` is called with the tier's capacity in blocks.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def expect(self, key: bytes) -> None:  # noqa: B027  (most policies need not know)
        """A key that the policy does not know is about to be stored; `evict` may follow."""

    @abstractmethod
    def insert(self, key: bytes) -> None:
        """A key that the policy does not know became resident."""

    @abstractmethod
    def hit(self, key: bytes) -> None:
        """A resident key was used. A request counts once per block, its tail first."""

    @abstractmethod
    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        """Choose a resident key for which `pinned` is false, forget it and return it.

        None if every key is pinned.
        """

    @abstractmethod
    def remove(self, key: bytes) -> None:
        """A resident key left for another reason than `evict`; its history is void."""
