"""HostTier: what is readable, what may leave, and which of two stores of a key wins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvortex.policies import LRU, AdmissionFilter, Place
from kvortex.tiers import HostTier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvortex.block import Block
    from kvortex.index import Index

A, B, C, D = b"a", b"b", b"c", b"d"


def tier(num_slots: int) -> HostTier:
    return HostTier(num_slots, LRU(num_slots))


def stored(host: HostTier, *keys: bytes) -> list[Block]:
    blocks = []
    for key in keys:
        one = host.reserve([key])
        host.commit(one)
        blocks += one
    return blocks


def counts(index: Index) -> tuple[int, int, int]:
    index.check()
    return index.free, index.reserved, index.resident


def readable(host: HostTier, keys: Sequence[bytes] = (A, B, C, D)) -> list[bytes]:
    assert host.policy_error is None  # or LRU would hide what the policy was told wrongly
    return [key for key in keys if host.lookup(key) is not None]


def test_readable_only_after_commit() -> None:
    host = tier(3)
    blocks = host.reserve([A, B])
    assert readable(host) == []
    assert host.is_arriving(A)
    assert counts(host.index) == (1, 2, 0)
    host.commit(blocks)
    assert readable(host) == [A, B]
    assert host.lookup(A) is blocks[0]
    assert not host.is_arriving(A)
    assert counts(host.index) == (1, 0, 2)


def test_aborted_leaves_nothing() -> None:
    host = tier(3)
    host.abort(host.reserve([A, B]))
    assert readable(host) == []
    assert not host.is_arriving(A)
    assert counts(host.index) == (3, 0, 0)


def test_full_tier_evicts_the_oldest() -> None:
    host = tier(2)
    stored(host, A, B)
    assert [block.key for block in host.reserve([C])] == [C]
    assert readable(host) == [B]
    assert host.evictions == 1


def test_a_prefix_outlives_its_tail() -> None:
    host = tier(3)
    host.commit(host.reserve([A, B, C]))
    host.reserve([D])
    assert readable(host) == [A, B]
    host.touch([A, B])
    host.reserve([b"e"])
    assert readable(host) == [A]


def test_touch_counts_a_use_and_ignores_the_unknown() -> None:
    host = tier(2)
    stored(host, A, B)
    host.touch([A, D])
    host.reserve([C])
    assert readable(host) == [A]


def test_lookup_is_no_use() -> None:
    host = tier(2)
    stored(host, A, B)
    host.lookup(A)
    host.reserve([C])
    assert readable(host) == [B]


def test_reserve_gives_a_leading_part() -> None:
    host = tier(3)
    stored(host, A, B)
    pinned = host.lookup(A)
    assert pinned is not None
    host.pin([pinned])
    blocks = host.reserve([b"1", b"2", b"3", b"4"])
    assert [block.key for block in blocks] == [b"1", b"2"]
    assert readable(host) == [A]
    assert host.reserve([D]) == []
    assert not host.is_arriving(b"3")


def test_pinned_is_never_a_victim_until_the_last_unpin() -> None:
    host = tier(1)
    blocks = stored(host, A)
    host.pin(blocks)
    host.pin(blocks)
    assert host.reserve([B]) == []
    host.unpin(blocks)
    assert host.reserve([B]) == []
    host.unpin(blocks)
    assert [block.key for block in host.reserve([B])] == [B]


def test_to_be_pinned_is_no_use() -> None:
    host = tier(3)
    pinned, *_ = stored(host, A, B, C)
    host.pin([pinned])
    host.reserve([D])
    host.unpin([pinned])
    host.reserve([b"e"])
    assert readable(host) == [C]


def test_second_store_of_a_key_replaces_the_first() -> None:
    host = tier(3)
    (old,) = stored(host, A)
    (new,) = stored(host, A)
    assert host.lookup(A) is new is not old
    assert counts(host.index) == (2, 0, 1)


def test_old_bytes_stay_readable_until_the_new_ones_arrive() -> None:
    host = tier(3)
    (old,) = stored(host, A)
    new = host.reserve([A])
    assert host.lookup(A) is old
    host.abort(new)
    assert host.lookup(A) is old


def test_replaced_while_read() -> None:
    host = tier(2)
    old = stored(host, A)
    host.pin(old)
    (new,) = stored(host, A)
    assert host.lookup(A) is new
    assert counts(host.index) == (0, 1, 1)
    host.unpin(old)
    assert counts(host.index) == (1, 0, 1)


def test_the_later_store_wins_in_any_order_of_arrival() -> None:
    host = tier(3)
    first, second = host.reserve([A]), host.reserve([A])
    host.commit(second)
    assert host.is_arriving(A)
    host.commit(first)
    assert host.lookup(A) is second[0]
    assert not host.is_arriving(A)
    assert counts(host.index) == (2, 0, 1)


def test_blocks_of_a_former_life_leave_the_oldest_first() -> None:
    host = tier(3)
    list(host.adopt({A: 2, B: 0, C: 3, D: -1}))  # of a pool that was larger
    assert (readable(host), counts(host.index)) == ([A, B], (1, 0, 2))
    host.reserve([b"1", b"2"])
    assert readable(host) == [B]
    host.reserve([b"3"])
    assert (readable(host), host.evictions) == ([], 2)


def test_what_is_here_or_comes_is_not_taken_from_a_former_life() -> None:
    host = tier(4)
    (here,) = stored(host, A)
    arriving = host.reserve([B])
    free = next(slot for slot in range(4) if slot not in (here.slot, arriving[0].slot))
    list(host.adopt({A: free, B: free, C: free}))
    assert host.lookup(A) is here
    assert (readable(host), counts(host.index)) == ([A, C], (1, 1, 2))
    host.commit(arriving)
    assert host.lookup(B) is arriving[0]


def test_new_bytes_for_a_block_that_is_next_to_leave_are_used_last() -> None:
    host = tier(3)
    old, _ = chain = host.reserve([A, B], [None, A])
    host.commit(chain)
    stored(host, C)
    host.touch([B])  # so that the policy names A, which leaves behind its tail
    new = host.reserve([A])
    assert (readable(host), host.lookup(A)) == ([A, C], old)
    host.commit(new)
    assert host.lookup(A) is new[0]
    assert counts(host.index) == (1, 0, 2)
    host.reserve([b"1", b"2"])
    assert readable(host) == [A]
    host.reserve([b"3"])
    assert (readable(host), host.evictions) == ([], 3)


def test_an_outdated_store_stays_unreadable_after_the_later_one_was_evicted() -> None:
    host = tier(2)
    first, second = host.reserve([A]), host.reserve([A])
    host.commit(second)
    host.reserve([B])
    assert readable(host) == []
    host.commit(first)
    assert readable(host) == []
    assert counts(host.index) == (1, 1, 0)


def test_an_earlier_store_counts_if_the_later_one_fails() -> None:
    host = tier(3)
    first, second = host.reserve([A]), host.reserve([A])
    host.abort(second)
    host.commit(first)
    assert host.lookup(A) is first[0]


def test_forget_drops_only_what_is_still_readable() -> None:
    host = tier(3)
    old = stored(host, A)
    new = stored(host, A)
    host.forget(old)
    assert host.lookup(A) is new[0]
    host.forget(new)
    assert readable(host) == []
    host.forget(new)
    assert counts(host.index) == (3, 0, 0)


def test_forgotten_key_is_a_new_one_to_the_policy() -> None:
    host = tier(1)
    host.forget(stored(host, A))
    stored(host, A)
    host.reserve([B])
    assert (readable(host), host.evictions) == ([], 1)


class _Nothing(AdmissionFilter):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.told: list[tuple[bytes, Place | None]] = []

    def hit(self, key: bytes) -> None:
        self.told.append((key, None))

    def admit(self, key: bytes, place: Place) -> bool:
        self.told.append((key, place))
        return False


def test_admission_is_for_full_pools() -> None:
    host = HostTier(2, LRU(2), _Nothing(2))
    assert host.admits(A, Place())
    stored(host, A)
    assert host.admits(B, Place())  # the last free slot
    stored(host, B)
    assert not host.admits(C, Place())
    host.clear()
    assert host.admits(C, Place())


def test_the_filter_hears_of_uses_and_places() -> None:
    listener = _Nothing(2)
    host = HostTier(2, LRU(2), listener)
    stored(host, A)
    host.touch([A, C])
    host.admits(B, Place(3, 5))
    assert listener.told == [(A, None), (B, Place(3, 5))]


def test_the_policy_hears_what_comes_before_it_makes_room() -> None:
    told = list[tuple[str, bytes | None]]()

    class Listener(LRU):
        def expect(self, key: bytes) -> None:
            told.append(("expect", key))

        def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
            victim = super().evict(pinned)
            told.append(("evict", victim))
            return victim

    stored(HostTier(1, Listener(1)), A, B)
    assert told == [("expect", A), ("expect", B), ("evict", A)]


def test_the_policy_is_to_expect_only_what_it_does_not_know() -> None:
    """Which may be readable: what the policy named leaves behind its tail."""
    told = list[bytes]()

    class Listener(LRU):
        def expect(self, key: bytes) -> None:
            told.append(key)

    host = HostTier(3, Listener(3))
    host.commit(host.reserve([A, B, C], [None, A, None]))
    told.clear()
    host.touch([B])
    host.touch([C])
    host.reserve([C])
    assert (readable(host), told) == ([A, C], [])
    host.reserve([A])
    assert (readable(host), told) == ([C], [A])


def test_nobody_gets_a_slot_whose_bytes_changed() -> None:
    host = tier(2)
    changed = stored(host, A)
    host.pin(changed)
    host.quarantine(changed)
    assert readable(host) == []
    host.unpin(changed)
    (block,) = host.reserve([B, C])
    assert block.slot != changed[0].slot


def test_a_slot_filled_from_disk_is_given_up_when_it_is_wrong_again() -> None:
    """The first time the drive may be to blame; two readers of a block tell of the same bytes."""
    host = tier(1)
    for times in (1, 2):
        (changed,) = stored(host, A)
        changed.from_disk = True
        host.pin([changed, changed])
        for _ in range(2):
            host.quarantine([changed])
            host.unpin([changed])
        assert (readable(host), host.index.quarantined) == ([], times - 1)
        assert bool(host.suspects) is (times == 1)
    assert host.reserve([B]) == []


def test_clear_spares_what_arrives() -> None:
    host = tier(4)
    pinned = stored(host, A)
    stored(host, B)
    host.pin(pinned)
    arriving = host.reserve([C])
    host.clear()
    assert readable(host) == []
    assert counts(host.index) == (2, 2, 0)
    host.commit(arriving)
    host.unpin(pinned)
    assert readable(host) == [C]
    assert counts(host.index) == (3, 0, 1)


def test_an_outdated_store_holds_nobody_up_that_is_committed_with_it() -> None:
    host = tier(4)
    old = host.reserve([A, B])
    newer = host.reserve([B])
    host.commit(newer)
    host.commit(old)
    assert (host.lookup(A), host.lookup(B)) == (old[0], newer[0])
    assert counts(host.index) == (2, 0, 2)


def test_each_victim_is_told_of_while_it_is_there() -> None:
    host, told = tier(1), list[tuple[bytes, bool]]()
    host.on_evict.append(lambda block: told.append((block.key, host.lookup(block.key) is block)))
    stored(host, A, B)
    assert told == [(A, True)]
