"""Index: slots are conserved, none has two holders, a key is readable only when published."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.block import Block, State
from kvortex.index import Index

A, B = b"a", b"b"


def counts(index: Index) -> tuple[int, int, int]:
    return index.free, index.reserved, index.resident


def test_new_index_is_free() -> None:
    index = Index(3)
    assert counts(index) == (3, 0, 0)
    assert index.get(A) is None
    assert list(index) == []


def test_reserved_is_not_readable() -> None:
    index = Index(3)
    block = index.reserve(A)
    assert (block.key, block.state, block.pins) == (A, State.RESERVED, 0)
    assert counts(index) == (2, 1, 0)
    assert index.get(A) is None
    assert list(index) == []


def test_published_is_readable() -> None:
    index = Index(3)
    block = index.reserve(A)
    index.publish(block)
    assert block.state is State.RESIDENT
    assert counts(index) == (2, 0, 1)
    assert index.get(A) is block
    assert list(index) == [block]


def test_every_slot_is_given_once() -> None:
    index = Index(5)
    blocks = [index.reserve(bytes([i])) for i in range(5)]
    assert sorted(block.slot for block in blocks) == [0, 1, 2, 3, 4]
    assert [block.order for block in blocks] == sorted({block.order for block in blocks})
    with pytest.raises(IndexError):
        index.reserve(A)


def test_forgotten_reservation_frees_its_slot() -> None:
    index = Index(1)
    block = index.reserve(A)
    index.forget(block)
    assert counts(index) == (1, 0, 0)
    assert index.reserve(B).slot == block.slot


def test_forgotten_block_waits_for_its_last_reader() -> None:
    index = Index(1)
    block = index.reserve(A)
    index.publish(block)
    index.pin(block)
    index.pin(block)
    index.forget(block)
    assert index.get(A) is None
    assert counts(index) == (0, 1, 0)
    index.unpin(block)
    assert counts(index) == (0, 1, 0)
    index.unpin(block)
    assert counts(index) == (1, 0, 0)


def test_unpinned_block_stays_readable() -> None:
    index = Index(1)
    block = index.reserve(A)
    index.publish(block)
    index.pin(block)
    index.unpin(block)
    assert index.get(A) is block
    assert counts(index) == (0, 0, 1)


def test_key_is_stored_anew_while_its_older_bytes_are_read() -> None:
    index = Index(2)
    old = index.reserve(A)
    index.publish(old)
    index.pin(old)
    new = index.reserve(A)
    assert index.get(A) is old
    index.forget(old)
    index.publish(new)
    assert index.get(A) is new
    assert new.slot != old.slot
    assert counts(index) == (0, 1, 1)
    index.unpin(old)
    assert counts(index) == (1, 0, 1)


def test_slots_past_a_limit_leave_with_their_holder() -> None:
    index = Index(4)
    blocks = [index.reserve(bytes([i])) for i in range(3)]
    index.limit(1)
    index.check()
    assert (index.num_slots, *counts(index)) == (3, 0, 3, 0)
    for block in blocks:
        index.forget(block)
        index.check()
    assert (index.num_slots, *counts(index)) == (1, 1, 0, 0)
    index.limit(9)
    assert index.num_slots == 1


@pytest.mark.parametrize(
    "act", ["publish twice", "second of a key", "pin reserved", "unpin unpinned"]
)
def test_misuse_is_our_own_bug(act: str) -> None:
    index = Index(3)
    block, other = index.reserve(A), index.reserve(A)
    index.publish(block)
    acts = {
        "publish twice": lambda: index.publish(block),
        "second of a key": lambda: index.publish(other),
        "pin reserved": lambda: index.pin(other),
        "unpin unpinned": lambda: index.unpin(block),
    }
    with pytest.raises(AssertionError):
        acts[act]()


def test_check_finds_a_slot_with_two_holders() -> None:
    index = Index(2)
    first, second = index.reserve(A), index.reserve(B)
    index.publish(first)
    index.publish(second)
    index.check()
    second.slot = first.slot
    with pytest.raises(AssertionError):
        index.check()


def test_check_finds_a_lost_slot() -> None:
    index = Index(2)
    index.check()
    index.num_slots = 3
    with pytest.raises(AssertionError):
        index.check()


VERBS = st.sampled_from(["reserve", "publish", "abort", "forget", "pin", "unpin"])


@given(steps=st.lists(st.tuples(VERBS, st.integers(0, 3), st.integers(0, 99)), max_size=60))
def test_conserves_slots(steps: list[tuple[str, int, int]]) -> None:
    index = Index(4)
    reserved: list[Block] = []
    readable: dict[bytes, Block] = {}
    pinned: list[Block] = []
    for verb, number, pick in steps:
        key = bytes([number])
        if verb == "reserve" and index.free:
            reserved.append(index.reserve(key))
        elif verb == "publish" and reserved:
            block = reserved.pop(pick % len(reserved))
            if block.key in readable:
                index.forget(readable.pop(block.key))
            index.publish(block)
            readable[block.key] = block
        elif verb == "abort" and reserved:
            index.forget(reserved.pop(pick % len(reserved)))
        elif verb == "forget" and key in readable:
            index.forget(readable.pop(key))
        elif verb == "pin" and key in readable:
            index.pin(readable[key])
            pinned.append(readable[key])
        elif verb == "unpin" and pinned:
            index.unpin(pinned.pop(pick % len(pinned)))
        index.check()
        assert {block.key: block for block in index} == readable
        held = {b.slot for b in (*reserved, *pinned, *readable.values())}
        assert index.free == 4 - len(held)
        assert index.reserved == len(held) - len(readable)
