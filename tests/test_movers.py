"""The parts of movers that need no GPU: which stretches a DMA copy takes, and where ids lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sequences import up_to

from kvortex.cargo import Cargo
from kvortex.id_ring import MANY, IdRing
from kvortex.movers.dma import merged
from kvortex.movers.staged import in_order_of_slots


class Copy:
    """A copy that ends when the test says so, or when somebody waits for it."""

    def __init__(self, done: bool = False) -> None:
        self.done = done
        self.waited = False

    def wait(self, timeout: float | None = None) -> bool:
        self.done = self.waited = True
        return True


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def alike(*numbers: int) -> Cargo:
    """Blocks whose slots and seeds are the same numbers."""
    return Cargo(ids(*numbers), ids(*numbers), ids(*numbers))


@pytest.mark.fuzz
@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 5)), max_size=30
    ),
    piece_bytes=st.integers(1, 50),
)
def test_merged_pieces_name_the_same_bytes_in_the_same_order(
    pieces: list[tuple[int, int, int]], piece_bytes: int
) -> None:
    """`other` is in the pool, whose pieces are of `piece_bytes`."""
    one, other, sizes = np.array(pieces, np.uint64).reshape(-1, 3).T
    within = other.astype(np.int64) // piece_bytes

    def pairs(a: np.ndarray, b: np.ndarray, n: np.ndarray) -> list[tuple[int, int]]:
        rows = zip(a.tolist(), b.tolist(), n.tolist(), strict=True)
        return [(x + i, y + i) for x, y, size in rows for i in range(size)]

    joined = merged(one, other, sizes, within)
    assert pairs(*joined) == pairs(one, other, sizes)
    a, b, n = joined
    starts = np.searchsorted(np.cumsum(sizes), np.cumsum(n) - n, side="right")
    follow = (a[:-1] + n[:-1] == a[1:]) & (b[:-1] + n[:-1] == b[1:])
    ends = [*(starts[1:] - 1), len(sizes) - 1]
    for first, last in zip(starts.tolist(), ends, strict=False):
        assert len(set(within[first : last + 1].tolist())) == 1
    assert np.all(within[starts[1:] - 1] != within[starts[1:]], where=follow)


def test_slots_come_in_order_with_their_blocks() -> None:
    cargo = in_order_of_slots(Cargo(ids(7, 8, 9), ids(5, 1, 3), ids(70, 80, 90)))
    assert cargo.slots.tolist() == [1, 3, 5]
    assert cargo.block_ids.tolist() == [8, 9, 7]
    assert cargo.seeds.tolist() == [80, 90, 70]


def test_a_slot_for_two_blocks_stays_with_both() -> None:
    cargo = in_order_of_slots(Cargo(ids(7, 8, 9), ids(5, 5, 3), ids(70, 80, 90)))
    assert cargo.slots.tolist() == [3, 5, 5]
    assert cargo.block_ids.tolist() == [9, 7, 8]
    assert cargo.seeds.tolist() == [90, 70, 80]


def test_ids_are_written_side_by_side() -> None:
    ring = IdRing(64)
    assert ring.write(Cargo(ids(1, 2), ids(3, 4), ids(-5, 6))) == 0
    assert ring.write(Cargo(np.arange(20), np.arange(20, 40), np.arange(40, 60))) == 2
    assert ring.rows[:3].tolist() == [[1, 3, -5], [2, 4, 6], [0, 20, 40]]
    assert ring.rows[21].tolist() == [19, 39, 59]
    assert ring.written == [range(2), range(2, 22)]
    ring.lend(Copy())
    assert ring.written == []


def test_rows_are_written_again_only_after_their_readers_ended() -> None:
    ring = IdRing(4)
    slow, other = Copy(), Copy()
    ring.write(alike(1, 2))
    ring.lend(slow)
    ring.write(alike(3))
    ring.lend(other)
    assert not slow.waited
    assert ring.write(alike(4, 5)) == 0
    assert slow.waited
    assert not other.waited
    ring.lend(Copy())
    ring.write(alike(6))
    assert other.waited


def test_ended_readers_are_forgotten() -> None:
    ring = IdRing(1 << 16)
    for _ in range(10 * MANY):
        ring.write(alike(1))
        ring.lend(Copy(done=True))
        assert len(ring._lent) <= MANY + 1


@pytest.mark.fuzz
@given(
    counts=up_to(40, st.integers(0, 16)),
    ended=up_to(60, st.integers(0, 39)),
)
def test_no_row_is_written_while_a_copy_reads_it(counts: list[int], ended: list[int]) -> None:
    ring, copies = IdRing(33), list[tuple[Copy, int, int]]()
    for number, count in enumerate(counts):
        start = ring.write(alike(*[number] * count))
        for copy, first, last in copies:
            assert copy.done or first == last or last <= start or first >= start + count
        copies.append((Copy(), start, start + count))
        ring.lend(copies[-1][0])
        for which in ended[number : number + 2]:
            if which < len(copies):
                copies[which][0].done = True
