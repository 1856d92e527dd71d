"""Each policy against its model: a full pool that stores, serves, pins, scans and loops."""

from __future__ import annotations

from typing import ClassVar

import pytest
from budget import budget
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from policy_models import MODELS, Model

from kvortex.plugins import load_policy

NUMBERS = st.integers(0, 11)
LARGE = 39
"""A capacity of which a tenth is more than one block, and not whole."""


class PolicyMachine(RuleBasedStateMachine):
    """Policy and model get the same steps, and must name the same victims."""

    name: ClassVar[str]

    @initialize(capacity=st.integers(1, 6) | st.just(LARGE))
    def start(self, capacity: int) -> None:
        self.policy = load_policy(self.name, capacity)
        self.model: Model = MODELS[self.name](capacity)
        self.resident: set[bytes] = set()
        self.pinned: set[bytes] = set()
        self.scanned = 0

    def access(self, key: bytes) -> None:
        if key in self.resident:
            self.policy.hit(key)
            self.model.hit(key)
            return
        self.policy.expect(key)
        self.model.expect(key)
        if len(self.resident) < self.policy.capacity or self.evict() is not None:
            self.policy.insert(key)
            self.model.insert(key)
            self.resident.add(key)

    def evict(self) -> bytes | None:
        victim = self.policy.evict(self.pinned.__contains__)
        assert victim == self.model.evict(self.pinned)
        if victim is not None:
            self.resident.remove(victim)
        return victim

    @rule(number=NUMBERS)
    def use(self, number: int) -> None:
        self.access(bytes([number]))

    @rule(first=NUMBERS, length=st.integers(2, 6), turns=st.integers(2, 4))
    def loop(self, first: int, length: int, turns: int) -> None:
        for step in range(length * turns):
            self.access(bytes([first + step % length]))

    @rule(length=st.integers(1, 12))
    def scan(self, length: int) -> None:
        for _ in range(length):
            self.scanned += 1
            self.access(b"scan" + self.scanned.to_bytes(4, "big"))

    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        key = bytes([number])
        if key in self.resident - self.pinned:
            self.policy.remove(key)
            self.model.remove(key)
            self.resident.remove(key)

    @rule()
    def make_room(self) -> None:
        self.evict()

    @rule(numbers=st.frozensets(NUMBERS, max_size=6))
    def pin(self, numbers: frozenset[int]) -> None:
        self.pinned = {bytes([number]) for number in numbers} & self.resident

    @invariant()
    def holds_no_more_than_fits(self) -> None:
        assert len(self.resident) <= self.policy.capacity

    def teardown(self) -> None:
        self.pinned = set()
        while self.resident:
            assert self.evict() is not None


@pytest.mark.fuzz
@pytest.mark.parametrize("name", MODELS)
def test_policy_equals_its_model(name: str) -> None:
    machine = type(f"{name}Machine", (PolicyMachine,), {"name": name})
    run_state_machine_as_test(machine, settings=budget(40, stateful_step_count=30))
