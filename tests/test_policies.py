"""Every installed policy: it knows exactly the resident keys, and never evicts a pinned one."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.plugins import load_policy, policy_names
from kvortex.policies.lru_freq import CANDIDATES

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvortex.policies import EvictionPolicy

Step = tuple[str, int, frozenset[int]]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "hit", "evict", "remove"]),
        st.integers(0, 7),
        st.frozensets(st.integers(0, 7), max_size=8),
    ),
    max_size=80,
)


def none_pinned(key: bytes) -> bool:
    return False


def drain(policy: EvictionPolicy) -> list[bytes]:
    """Every key, in the order in which the policy lets go of them."""
    order = []
    while (key := policy.evict(none_pinned)) is not None:
        order.append(key)
        assert len(order) < 100
    return order


@pytest.mark.parametrize("name", policy_names())
@given(steps=STEPS)
def test_contract(name: str, steps: list[Step]) -> None:
    policy = load_policy(name, 8)
    resident: set[bytes] = set()
    for verb, number, pinned_numbers in steps:
        key, pinned = bytes([number]), {bytes([n]) for n in pinned_numbers}
        if verb == "insert" and key not in resident:
            policy.insert(key)
            resident.add(key)
        elif verb == "hit" and key in resident:
            policy.hit(key)
        elif verb == "remove" and key in resident:
            policy.remove(key)
            resident.remove(key)
        elif verb == "evict":
            victim = policy.evict(pinned.__contains__)
            if resident <= pinned:
                assert victim is None
            else:
                assert victim in resident - pinned
                resident.remove(victim)
    assert sorted(drain(policy)) == sorted(resident)
    assert policy.evict(none_pinned) is None


@pytest.mark.parametrize("name", policy_names())
@given(steps=STEPS)
def test_same_steps_same_victims(name: str, steps: list[Step]) -> None:
    """A policy that drew lots could not be replayed."""
    assert _victims(name, steps) == _victims(name, steps)


def among(pinned: frozenset[int]) -> Callable[[bytes], bool]:
    return lambda key: key[0] in pinned


def _victims(name: str, steps: list[Step]) -> list[bytes | None]:
    policy, resident, victims = load_policy(name, 8), set(), []
    for verb, number, pinned in steps:
        key = bytes([number])
        if verb == "insert" and key not in resident:
            policy.insert(key)
            resident.add(key)
        elif verb == "hit" and key in resident:
            policy.hit(key)
        elif verb == "evict":
            victims.append(policy.evict(among(pinned)))
            resident.discard(victims[-1])
    return victims + drain(policy)


@pytest.mark.parametrize("name", policy_names())
def test_capacity_is_told(name: str) -> None:
    assert load_policy(name, 123).capacity == 123


@given(steps=STEPS)
def test_lru_equals_a_list(steps: list[Step]) -> None:
    policy, order = load_policy("lru", 8), []
    for verb, number, pinned in steps:
        key = bytes([number])
        if verb == "insert" and key not in order:
            policy.insert(key)
            order.append(key)
        elif verb == "hit" and key in order:
            policy.hit(key)
            order.append(order.pop(order.index(key)))
        elif verb == "remove" and key in order:
            policy.remove(key)
            order.remove(key)
        elif verb == "evict":
            expected = next((k for k in order if k[0] not in pinned), None)
            assert policy.evict(among(pinned)) == expected
            if expected is not None:
                order.remove(expected)
    assert drain(policy) == order


@given(steps=STEPS)
def test_lfu_equals_a_counter(steps: list[Step]) -> None:
    """Fewest uses first; among equals, the one that reached the number first."""
    policy, uses, since = load_policy("lfu", 8), Counter[bytes](), dict[bytes, int]()
    for now, (verb, number, pinned) in enumerate(steps):
        key = bytes([number])
        if verb == "insert" and key not in uses:
            policy.insert(key)
            uses[key], since[key] = 1, now
        elif verb == "hit" and key in uses:
            policy.hit(key)
            uses[key], since[key] = uses[key] + 1, now
        elif verb == "remove" and key in uses:
            policy.remove(key)
            del uses[key]
        elif verb == "evict":
            left = [k for k in uses if k[0] not in pinned]
            expected = min(left, key=lambda k: (uses[k], since[k]), default=None)
            assert policy.evict(among(pinned)) == expected
            if expected is not None:
                del uses[expected]
    assert drain(policy) == sorted(uses, key=lambda k: (uses[k], since[k]))


def test_history_is_void_after_remove() -> None:
    policy = load_policy("lfu", 8)
    policy.insert(b"a")
    policy.hit(b"a")
    policy.remove(b"a")
    policy.insert(b"b")
    policy.hit(b"b")
    policy.insert(b"a")
    assert drain(policy) == [b"a", b"b"]


def test_lru_freq_spares_what_is_used_often() -> None:
    policy = load_policy("lru_freq", 8)
    for key in (b"often", b"once", b"new"):
        policy.insert(key)
    policy.hit(b"often")
    policy.hit(b"new")
    assert drain(policy) == [b"once", b"often", b"new"]


def test_lru_freq_survivors_pay_with_a_use() -> None:
    """Yesterday's favourite leaves after as many rounds as it was used more often."""
    policy = load_policy("lru_freq", 8)
    policy.insert(b"favourite")
    for _ in range(3):
        policy.hit(b"favourite")
    for number in range(CANDIDATES):  # it is the oldest of them now
        policy.insert(bytes([number]))
    left = []
    for number in range(100, 110):
        left.append(policy.evict(none_pinned))
        policy.insert(bytes([number]))
    assert left.index(b"favourite") == 3


def test_lru_freq_looks_at_the_oldest_only() -> None:
    policy = load_policy("lru_freq", 99)
    for number in range(CANDIDATES + 1):
        policy.insert(bytes([number]))
    for number in range(CANDIDATES):
        policy.hit(bytes([number]))
    policy.insert(b"young and used once")
    assert policy.evict(none_pinned) == bytes([CANDIDATES])  # now the oldest, and used once
    assert policy.evict(none_pinned) == bytes(
        [0]
    )  # of equals the oldest; the young one is no candidate
