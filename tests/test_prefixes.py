"""Prefixes in a tier: with every policy the tail of a request leaves first, and no orphan stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from budget import budget
from hypothesis import given
from hypothesis import strategies as st
from sequences import up_to

from kvortex.plugins import load_policy, policy_names
from kvortex.policies import LRU
from kvortex.tiers import HostTier

if TYPE_CHECKING:
    from kvortex.block import Block

SLOTS = 12
REQUESTS = st.text("ab", min_size=1, max_size=7)
"""Each letter continues what is before it, so that requests share prefixes."""


def chain(request: str) -> list[bytes]:
    return [request[: end + 1].encode() for end in range(len(request))]


def parents(keys: list[bytes]) -> list[bytes | None]:
    return [key[:-1] or None for key in keys]


def readable(host: HostTier) -> set[bytes]:
    return {block.key for block in host.index}


class Served:
    """A tier that is driven as the connector drives it; every eviction is looked at."""

    def __init__(self, policy: str) -> None:
        self.host = HostTier(SLOTS, load_policy(policy, SLOTS))
        self.policy = self.host._policy._policy
        self.under_way: list[list[Block]] = []
        self.pinned: list[list[Block]] = []

    def ask(self, request: str, chunk: int) -> None:
        """A request comes: its blocks are touched, and what is missing is stored in chunks."""
        keys = chain(request)
        self.host.touch(keys)
        for start in range(0, len(keys), chunk):
            self.store([key for key in keys[start : start + chunk] if self.wants(key)])

    def wants(self, key: bytes) -> bool:
        return self.host.lookup(key) is None and not self.host.is_arriving(key)

    def store(self, keys: list[bytes]) -> None:
        before = readable(self.host)
        blocks = self.host.reserve(keys, parents(keys))
        after = readable(self.host)
        for key in before - after:
            assert not {key + b"a", key + b"b"} & after, "a prefix left before its tail"
        if blocks:
            self.under_way.append(blocks)

    def arrive(self, number: int, well: bool) -> None:
        if self.under_way:
            blocks = self.under_way.pop(number % len(self.under_way))
            (self.host.commit if well else self.host.abort)(blocks)

    def read(self, request: str) -> None:
        """A load pins a readable prefix until `done`."""
        found = [block for key in chain(request) if (block := self.host.lookup(key)) is not None]
        self.host.touch([block.key for block in found])
        self.host.pin(found)
        self.pinned.append(found)

    def done(self) -> None:
        if self.pinned:
            self.host.unpin(self.pinned.pop(0))

    def lose(self, request: str) -> None:
        block = self.host.lookup(request.encode())
        if block is not None:
            self.host.forget([block])


STEPS = st.one_of(
    st.tuples(st.just("ask"), REQUESTS, st.integers(1, 4)),
    st.tuples(st.just("ask"), REQUESTS, st.integers(1, 4)),
    st.tuples(st.just("arrive"), st.integers(0, 9), st.booleans()),
    st.tuples(st.just("arrive"), st.integers(0, 9), st.just(True)),
    st.tuples(st.just("read"), REQUESTS),
    st.tuples(st.just("done")),
    st.tuples(st.just("lose"), REQUESTS),
)


@pytest.mark.parametrize("name", policy_names())
@pytest.mark.fuzz
@given(steps=up_to(60, STEPS))
@budget(30)
def test_the_tail_leaves_first(name: str, steps: list[tuple[object, ...]]) -> None:
    served = Served(name)
    for verb, *arguments in steps:
        getattr(served, str(verb))(*arguments)
        served.host.index.check()
    while served.under_way:
        served.arrive(0, well=True)
    while served.pinned:
        served.done()
    served.host.index.check()
    assert len(served.host.reserve([b"%d" % i for i in range(SLOTS)])) == SLOTS
    assert readable(served.host) == set()
    assert served.host._policy._policy is served.policy, "the policy was found wrong"


def lru(slots: int, *requests: str) -> HostTier:
    """Requests that were stored one block at a time, the first block first."""
    host = HostTier(slots, LRU(slots))
    for request in requests:
        store(host, chain(request))
    return host


def store(host: HostTier, keys: list[bytes]) -> None:
    for key in keys:
        host.commit(host.reserve([key], parents([key])))


def test_a_prompt_stored_in_chunks_loses_its_tail() -> None:
    host = lru(6, "aaaa", "bb")
    for left in (3, 2, 1, 0):
        host.reserve([b"%d" % left])
        assert readable(host) == {*chain("a" * left), *chain("bb")}


def test_a_use_saves_what_waits_to_leave() -> None:
    host = lru(6, "aaaa", "bb")
    host.reserve([b"1"])
    host.touch(chain("aaa"))
    host.reserve([b"2"])
    assert readable(host) == {*chain("aaa"), b"b"}


def test_a_victim_whose_tail_is_read_is_spared() -> None:
    host = lru(4, "aa", "bb")
    tail = host.lookup(b"aa")
    assert tail is not None
    host.pin([tail])
    assert len(host.reserve([b"1", b"2", b"3"])) == 2
    assert readable(host) == {b"a", b"aa"}
    host.unpin([tail])
    assert len(host.reserve([b"3", b"4"])) == 2
    assert readable(host) == set()


def test_orphans_leave_before_all_others() -> None:
    host = lru(6, "aaa", "bbb")
    host.touch(chain("aaa"))
    host.touch(chain("bbb"))
    gone = host.lookup(b"b")
    assert gone is not None
    host.forget([gone])
    host.reserve([b"1", b"2"])
    assert readable(host) == {*chain("aaa"), b"bb"}
    store(host, [b"b"])  # takes the place of bb
    assert readable(host) == {*chain("aaa"), b"b"}


def test_an_orphan_whose_prefix_comes_again_is_none() -> None:
    host = lru(4, "aa", "b")
    gone = host.lookup(b"a")
    assert gone is not None
    host.forget([gone])
    store(host, [b"a"])
    host.touch(chain("aa"))
    host.reserve([b"1", b"2"])
    assert readable(host) == {b"a", b"aa"}


def test_a_tail_whose_prefix_did_not_arrive_is_an_orphan() -> None:
    host = lru(4, "b")
    blocks = host.reserve(chain("aa"), parents(chain("aa")))
    host.commit(blocks[1:])
    host.abort(blocks[:1])
    host.reserve([b"1", b"2", b"3"])
    assert readable(host) == {b"b"}


@pytest.mark.parametrize("circle", ["a", "ab", "abc"])
def test_keys_that_go_round_in_a_circle_hold_nobody_up(circle: str) -> None:
    """A prefix's hash never does, but ids in a trace that somebody wrote may."""
    keys = [letter.encode() for letter in circle]
    host = HostTier(len(keys), LRU(len(keys)))
    host.commit(host.reserve(keys, [keys[-1], *keys[:-1]]))
    assert len(host.reserve([b"%d" % i for i in range(len(keys))])) == len(keys)
    host.index.check()


def test_a_victim_is_found_in_constant_time() -> None:
    """A prompt of many blocks leaves block by block, without a walk for each."""
    host = lru(4000, "a" * 4000)
    steps = 0

    class Counted(list[object]):
        def append(self, block: object) -> None:
            nonlocal steps
            steps += 1
            super().append(block)

    host._path = Counted()  # type: ignore[assignment]
    assert len(host.reserve([b"%d" % i for i in range(2000)])) == 2000
    assert steps == 4000
    assert readable(host) == set(chain("a" * 2000))
