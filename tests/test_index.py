"""Index: slots are conserved, none has two holders, a key is readable only when published."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sequences import up_to

from kvortex.block import Block, State
from kvortex.index import Index

A, B, C = b"a", b"b", b"c"


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


def test_blocks_of_a_former_life_are_readable_where_they_lie() -> None:
    index, told = Index(4), list[tuple[bytes, bool]]()
    index.on_change = lambda key, readable: told.append((key, readable))
    assert [key for keys in index.adopt([(A, 2), (B, 0)]) for key in keys] == [A, B]
    assert counts(index) == (2, 0, 2)
    first, second = index.get(A), index.get(B)
    assert first is not None
    assert second is not None
    assert first is index.get(A)
    index.check()
    assert [(block.key, block.slot, block.parent) for block in index] == [
        (A, 2, None),
        (B, 0, None),
    ]
    assert told == [(A, True), (B, True)]
    later = [index.reserve(b"c"), index.reserve(b"d")]
    assert {block.slot for block in later} == {1, 3}
    assert max(first.order, second.order) < later[0].order
    index.forget(first)
    assert (counts(index), told[-1]) == ((1, 2, 1), (A, False))
    index.check()


def test_adopted_blocks_are_in_the_tree_like_others() -> None:
    """Whether they come before what continues them or after, and nobody asked for them yet."""
    index = Index(4)
    child = index.reserve(B, A)
    index.publish(child)
    assert list(index.orphans(A)) == [child]
    for _ in index.adopt([(A, 0), (C, 1)]):
        pass
    assert child.above is index.get(A)
    assert list(index.orphans(A)) == []
    late = index.reserve(b"late", C)
    index.publish(late)
    parent = index.get(C)
    assert parent is not None
    assert (late.above, parent.below) == (parent, late)
    index.forget(parent)
    assert list(index.orphans(C)) == [late]
    assert len(list(index)) == 3


@pytest.mark.parametrize("batches", range(6))
def test_what_is_not_adopted_to_the_end_is_given_back(
    batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvortex.index.BATCH", 2)
    index = Index(8)
    adoption = index.adopt([(b"%d" % slot, slot) for slot in (3, 1, 6, 0, 7)])
    for _ in itertools.islice(adoption, batches):
        pass
    adoption.close()
    index.check()
    assert index.resident == (0, 0, 0, 2, 4, 5)[batches]
    assert index.free == 8 - index.resident


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


def test_slots_are_opened_as_they_come() -> None:
    index = Index(6)
    index.open(2)
    index.check()
    assert (index.num_slots, *counts(index)) == (2, 2, 0, 0)
    blocks = [index.reserve(bytes([i])) for i in range(2)]
    assert sorted(block.slot for block in blocks) == [0, 1]
    index.open(5)
    index.check()
    assert (index.num_slots, *counts(index)) == (5, 3, 2, 0)
    index.open(6)
    index.check()
    assert (index.num_slots, *counts(index)) == (6, 4, 2, 0)


def test_a_slot_that_was_given_out_too_early_waits_until_it_is_ready() -> None:
    index = Index(6)
    blocks = [index.reserve(bytes([i])) for i in range(4)]
    index.open(2)
    index.check()
    assert (index.num_slots, *counts(index)) == (4, 0, 4, 0)
    index.forget(blocks[3])
    index.check()
    assert (index.num_slots, *counts(index)) == (3, 0, 3, 0)
    index.forget(blocks[0])
    assert (index.num_slots, *counts(index)) == (3, 1, 2, 0)
    index.open(6)
    index.check()
    assert (index.num_slots, *counts(index)) == (6, 4, 2, 0)


def test_no_slot_is_opened_past_a_limit() -> None:
    index = Index(6)
    index.open(2)
    index.limit(4)
    index.check()
    assert index.num_slots == 2
    index.open(6)
    index.check()
    assert index.num_slots == 4


def test_check_finds_a_closed_slot_that_was_lost() -> None:
    index = Index(6)
    index.open(2)
    index.check()
    index._closed.pop()
    with pytest.raises(AssertionError):
        index.check()


@pytest.mark.fuzz
@given(
    acts=up_to(
        40, st.tuples(st.sampled_from(["open", "limit", "reserve", "forget"]), st.integers(0, 8))
    )
)
def test_no_slot_is_lost_or_given_out_before_its_time(acts: list[tuple[str, int]]) -> None:
    index, opened, limit = Index(8), 8, 8
    held: list[Block] = []
    for act, number in acts:
        if act == "open":
            opened = number
            index.open(number)
        elif act == "limit":
            limit = min(limit, number)
            index.limit(number)
            opened = min(opened, limit)
        elif act == "reserve" and index.free:
            held.append(index.reserve(b"a"))
            assert held[-1].slot < min(opened, limit)
        elif act == "forget" and held:
            index.forget(held.pop(number % len(held)))
        index.check()
    for block in held:
        index.forget(block)
    index.open(8)
    index.check()
    assert index.free == index.num_slots == limit


@pytest.mark.parametrize(
    "act",
    ["publish twice", "publish forgotten", "second of a key", "pin reserved", "unpin unpinned"],
)
def test_misuse_is_our_own_bug(act: str) -> None:
    index = Index(3)
    block, other = index.reserve(A), index.reserve(A)
    index.publish(block)
    forgotten = index.reserve(B)
    index.forget(forgotten)
    acts = {
        "publish twice": lambda: index.publish(block),
        "publish forgotten": lambda: index.publish(forgotten),
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


def test_check_finds_a_slot_past_the_limit() -> None:
    index = Index(6)
    index.limit(4)
    index.open(2)
    index.check()
    index._closed[index._closed.index(3)] = 4
    with pytest.raises(AssertionError):
        index.check()


def test_check_finds_a_slot_that_was_not_opened() -> None:
    index = Index(4)
    index.open(2)
    index.check()
    index._closed.remove(2)
    index._free.append(2)
    index.num_slots += 1
    with pytest.raises(AssertionError):
        index.check()


VERBS = st.sampled_from(["reserve", "publish", "abort", "forget", "pin", "unpin"])


@pytest.mark.fuzz
@given(steps=up_to(60, st.tuples(VERBS, st.integers(0, 3), st.integers(0, 99))))
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
