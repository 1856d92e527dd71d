"""SpscRing: first in, first out, nothing lost, from one thread to another."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sequences import up_to

from kvortex.spsc import SpscRing


def records(*numbers: int) -> np.ndarray:
    return np.array([(number, -number) for number in numbers], np.int64).reshape(-1, 2)


def test_a_new_ring_is_empty() -> None:
    ring = SpscRing(4, 2)
    assert len(ring) == 0
    assert ring.pop(9).shape == (0, 2)


def test_what_finds_no_room_is_not_taken() -> None:
    ring = SpscRing(3, 2)
    assert ring.push(records(1, 2)) == 2
    assert ring.push(records(3, 4, 5)) == 1
    assert ring.push(records(6)) == 0
    assert len(ring) == 3
    assert ring.pop(9).tolist() == records(1, 2, 3).tolist()


def test_records_wrap_around_the_end() -> None:
    ring = SpscRing(3, 2)
    ring.push(records(1, 2))
    ring.pop(2)
    assert ring.push(records(3, 4, 5)) == 3
    assert ring.pop(2).tolist() == records(3, 4).tolist()
    assert ring.pop(2).tolist() == records(5).tolist()


def test_popped_records_are_the_callers_own() -> None:
    ring = SpscRing(2, 2)
    ring.push(records(1, 2))
    popped = ring.pop(2)
    ring.push(records(8, 9))
    assert popped.tolist() == records(1, 2).tolist()


@pytest.mark.parametrize(("capacity", "width"), [(0, 2), (-1, 2), (4, 0)])
def test_a_ring_that_can_hold_nothing_is_refused(capacity: int, width: int) -> None:
    with pytest.raises(ValueError, match="cannot hold any"):
        SpscRing(capacity, width)


@pytest.mark.fuzz
@given(
    capacity=st.integers(1, 9),
    steps=up_to(60, st.tuples(st.booleans(), st.integers(0, 12))),
)
def test_like_a_bounded_queue(capacity: int, steps: list[tuple[bool, int]]) -> None:
    ring, queue, number = SpscRing(capacity, 1), deque[int](), 0
    for push, count in steps:
        if push:
            batch = np.arange(number, number + count, dtype=np.int64)[:, None]
            taken = ring.push(batch)
            assert taken == min(count, capacity - len(queue))
            queue.extend(batch[:taken, 0].tolist())
            number += taken
        else:
            expected = [queue.popleft() for _ in range(min(count, len(queue)))]
            assert ring.pop(count)[:, 0].tolist() == expected
        assert len(ring) == len(queue)


def test_between_two_threads_nothing_is_lost_or_swapped() -> None:
    ring, total = SpscRing(97, 1), 50_000
    popped: list[np.ndarray] = []

    def consume() -> None:
        left = total
        while left:
            popped.append(ring.pop(31))
            left -= len(popped[-1])

    thread = threading.Thread(target=consume)
    thread.start()
    numbers, sent = np.arange(total, dtype=np.int64)[:, None], 0
    while sent < total:
        sent += ring.push(numbers[sent : sent + 64])
    thread.join()
    assert np.array_equal(np.concatenate(popped), numbers)
