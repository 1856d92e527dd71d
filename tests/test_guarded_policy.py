"""A policy that raises or breaks its word is named once and replaced; the tier loses nothing."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from kvortex.policies import LRU, EvictionPolicy
from kvortex.tiers import HostTier

if TYPE_CHECKING:
    from collections.abc import Callable

VERBS = ("insert", "hit", "evict", "remove")
KEYS = [bytes([number]) for number in range(12)]


class Failing(LRU):
    """Right until its n-th call, then raises in every verb."""

    def __init__(self, capacity: int, calls: int) -> None:
        super().__init__(capacity)
        self.calls = calls

    def _count(self) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise ZeroDivisionError("on command")

    def insert(self, key: bytes) -> None:
        self._count()
        super().insert(key)

    def hit(self, key: bytes) -> None:
        self._count()
        super().hit(key)

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        self._count()
        return super().evict(pinned)

    def remove(self, key: bytes) -> None:
        self._count()
        super().remove(key)


class Nonsense(LRU):
    """Names whatever it was told to."""

    victim: Any = None

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        victim: bytes | None = self.victim
        return victim


def serve(host: HostTier) -> list[bytes]:
    """Every verb of the tier; returns the readable keys."""
    host.commit(host.reserve(KEYS[:4]))
    pinned = [block for block in map(host.lookup, KEYS[1:3]) if block is not None]
    host.touch(KEYS[:2])
    host.pin(pinned)
    for key in KEYS[4:8]:
        host.commit(host.reserve([key]))
        host.index.check()
    host.commit(host.reserve([KEYS[4]]))
    assert all(host.lookup(block.key) is block for block in pinned)
    host.unpin(pinned)
    host.forget(pinned[:1])
    host.commit(host.reserve(KEYS[8:12]))
    host.index.check()
    assert host.index.reserved == 0
    readable = [key for key in KEYS if host.lookup(key) is not None]
    assert len(readable) == host.index.num_slots
    host.clear()
    assert host.index.free == host.index.num_slots
    return readable


@pytest.mark.parametrize("calls", range(24))
def test_a_policy_that_raises_costs_nothing_but_its_order(
    calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    host = HostTier(5, Failing(5, calls))
    assert serve(host)
    assert serve(host)
    (record,) = caplog.records
    assert "Failing is replaced by LRU" in record.message
    assert "on command" in record.message


@pytest.mark.parametrize("victim", [None, KEYS[0], b"unknown", 7, [KEYS[1]], KEYS[5].hex()])
def test_a_policy_that_names_a_wrong_victim_is_replaced(
    victim: object, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Nonsense(3)
    policy.victim = victim
    host = HostTier(3, policy)
    host.commit(host.reserve(KEYS[:3]))
    first = host.lookup(KEYS[0])
    assert first is not None
    host.pin([first])
    assert [block.key for block in host.reserve([b"new"])] == [b"new"]
    assert host.lookup(KEYS[0]) is first
    assert ": evict " in caplog.text
    host.index.check()


def test_no_victim_is_right_where_everything_is_pinned(caplog: pytest.LogCaptureFixture) -> None:
    host = HostTier(2, LRU(2))
    blocks = host.reserve(KEYS[:2])
    host.commit(blocks)
    host.pin(blocks)
    assert host.reserve([b"new"]) == []
    assert caplog.records == []


def test_order_of_uses_reaches_the_policy() -> None:
    seen: list[tuple[str, bytes]] = []

    class Recorder(EvictionPolicy):
        def insert(self, key: bytes) -> None:
            seen.append(("insert", key))

        def hit(self, key: bytes) -> None:
            seen.append(("hit", key))

        def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
            seen.append(("evict", KEYS[0]))
            return KEYS[0]

        def remove(self, key: bytes) -> None:
            seen.append(("remove", key))

    host = HostTier(2, Recorder(2))
    host.commit(host.reserve(KEYS[:2]))
    host.touch(KEYS[:2])
    host.reserve([KEYS[2]])
    host.clear()
    first, second = KEYS[:2]
    expected = [("insert", second), ("insert", first), ("hit", second), ("hit", first)]
    assert seen == [*expected, ("evict", first), ("remove", second)]
    assert set(itertools.chain(name for name, _ in seen)) == set(VERBS)
