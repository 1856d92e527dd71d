"""GuardedPolicy: a policy whose errors cost hits only, never the engine. Scheduler side."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvortex.policies import LRU, EvictionPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

logger = logging.getLogger(__name__)


class GuardedPolicy(EvictionPolicy):
    """Passes each verb on, and gives the tier to LRU once the policy raises or breaks its word.

    Args:
        policy: somebody's policy, not trusted.
        resident: the tier's own map of resident keys.
    """

    def __init__(self, policy: EvictionPolicy, resident: Collection[bytes]) -> None:
        super().__init__(getattr(policy, "capacity", 0))
        self.replaced: str | None = None
        """Why it was, if it was."""
        self._policy = policy
        self._resident = resident
        self._leaving: bytes | None = None
        """The victim named last; it may stay resident for a while, and come back by `insert`."""

    def expect(self, key: bytes) -> None:
        try:
            self._policy.expect(key)
        except Exception as error:  # noqa: BLE001
            self._replace(repr(error), error)

    def insert(self, key: bytes) -> None:
        """`key` is in the map already."""
        self._leaving = None if key == self._leaving else self._leaving
        try:
            self._policy.insert(key)
        except Exception as error:  # noqa: BLE001
            self._replace(repr(error), error)

    def insert_all(self, keys: Iterable[bytes]) -> None:
        """As many `insert`s of keys that were never here."""
        insert = self._policy.insert
        try:
            for key in keys:
                insert(key)
        except Exception as error:  # noqa: BLE001
            self._replace(repr(error), error)

    def hit(self, key: bytes) -> None:
        try:
            self._policy.hit(key)
        except Exception as error:  # noqa: BLE001
            self._replace(repr(error), error)

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        try:
            victim = self._policy.evict(pinned)
            wrong = self._what_is_wrong(victim, pinned)
            if wrong is not None:
                self._replace(f"evict {wrong}")
                victim = self._policy.evict(pinned)
        except Exception as error:  # noqa: BLE001
            self._replace(repr(error), error)
            victim = self._policy.evict(pinned)
        self._leaving = victim
        return victim

    def remove(self, key: bytes) -> None:
        """`key` is in the map still."""
        try:
            self._policy.remove(key)
        except Exception as error:  # noqa: BLE001
            self._replace(repr(error), error)
            self._policy.remove(key)

    def _what_is_wrong(self, victim: object, pinned: Callable[[bytes], bool]) -> str | None:
        if victim is None:
            left = any(not pinned(key) for key in self._resident)
            return "found no key though one is not pinned" if left else None
        if not isinstance(victim, bytes) or victim not in self._resident:
            return f"returned {victim!r}, which is not resident"
        return f"returned {victim.hex()}, which is pinned" if pinned(victim) else None

    def _replace(self, reason: str, error: Exception | None = None) -> None:
        name = type(self._policy).__qualname__
        logger.error(
            "Eviction policy %s is replaced by LRU in a tier of %d blocks: %s.",
            name,
            self.capacity,
            reason,
            exc_info=error,
        )
        self.replaced = reason
        self._policy = LRU(self.capacity)
        for key in self._resident:
            if key != self._leaving:
                self._policy.insert(key)
