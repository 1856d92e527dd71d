"""Every installed policy: it knows exactly the resident keys, and never evicts a pinned one."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import TYPE_CHECKING
from zlib import crc32

import pytest
from budget import budget
from hypothesis import given
from hypothesis import strategies as st
from sequences import up_to

from kvortex.plugins import load_policy, policy_names
from kvortex.policies import ADMISSIONS, Place, contest
from kvortex.policies.adaptive import Adaptive
from kvortex.policies.ghosts import Ghosts
from kvortex.policies.miniature import MOST_BLOCKS, Miniature, Sample
from kvortex.policies.reuse import LEAST_WATCHED, MOST_WATCHED, SAMPLE, ReuseDistance
from kvortex.policies.sketch import FrequencySketch

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvortex.policies import EvictionPolicy

Step = tuple[str, int, frozenset[int]]
STEPS = up_to(
    80,
    st.tuples(
        st.sampled_from(["insert", "hit", "evict", "remove"]),
        st.integers(0, 7),
        st.integers(0, 255).map(lambda bits: frozenset(n for n in range(8) if bits >> n & 1)),
    ),
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
@pytest.mark.fuzz
@given(capacity=st.sampled_from([8, 200]), steps=STEPS)
@budget(30)
def test_contract(name: str, capacity: int, steps: list[Step]) -> None:
    policy = load_policy(name, capacity)
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
@pytest.mark.fuzz
@given(steps=STEPS)
@budget(10)
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


@pytest.mark.parametrize("name", ADMISSIONS)
def test_capacity_is_told_to_filters(name: str) -> None:
    assert ADMISSIONS[name](17).capacity == 17


def test_always_is_always() -> None:
    assert ADMISSIONS["always"](1).admit(b"a", Place())


@pytest.mark.parametrize("name", ["lru", "fifo"])
@pytest.mark.fuzz
@given(steps=STEPS)
@budget(30)
def test_queues_equal_a_list(name: str, steps: list[Step]) -> None:
    policy, order = load_policy(name, 8), list[bytes]()
    for verb, number, pinned in steps:
        key = bytes([number])
        if verb == "insert" and key not in order:
            policy.insert(key)
            order.append(key)
        elif verb == "hit" and key in order:
            policy.hit(key)
            if name == "lru":
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


@pytest.mark.fuzz
@given(steps=STEPS)
@budget(30)
def test_lfu_equals_a_table_of_weights(steps: list[Step]) -> None:
    """Least uses plus age first; among equals, the one that reached the weight first."""
    policy, age = load_policy("lfu", 8), 0
    uses, weight, since = Counter[bytes](), dict[bytes, int](), dict[bytes, int]()
    for now, (verb, number, pinned) in enumerate(steps):
        key = bytes([number])
        if verb in ("insert", "hit") and (key in weight) == (verb == "hit"):
            getattr(policy, verb)(key)
            uses[key] += 1
            weight[key], since[key] = age + uses[key], now
        elif verb == "remove" and key in weight:
            policy.remove(key)
            del uses[key], weight[key]
        elif verb == "evict":
            age = min(weight.values(), default=age)
            left = [k for k in weight if k[0] not in pinned]
            expected = min(left, key=lambda k: (weight[k], since[k]), default=None)
            assert policy.evict(among(pinned)) == expected
            if expected is not None:
                del uses[expected], weight[expected]
    assert drain(policy) == sorted(weight, key=lambda k: (weight[k], since[k]))


@pytest.mark.fuzz
@given(steps=STEPS)
@budget(30)
def test_sieve_equals_a_list_with_a_hand(steps: list[Step]) -> None:
    """One list, oldest first, and the index of the hand; keys that are pinned keep their mark."""
    policy, order, used, hand = load_policy("sieve", 8), list[bytes](), set[bytes](), 0
    for verb, number, pinned in steps:
        key = bytes([number])
        if verb in ("insert", "hit") and (key in order) == (verb == "hit"):
            getattr(policy, verb)(key)
            if verb == "insert":
                hand = 0 if hand >= len(order) else hand
                order.append(key)
            else:
                used.add(key)
        elif verb == "remove" and key in order:
            policy.remove(key)
            hand -= order.index(key) < hand
            order.remove(key)
            used.discard(key)
        elif verb == "evict":
            expected = None
            for _ in range(2 * len(order)):
                hand = 0 if hand >= len(order) else hand
                at = order[hand]
                if at not in used and at[0] not in pinned:
                    expected = order.pop(hand)
                    break
                if at[0] not in pinned:
                    used.discard(at)
                hand += 1
            assert policy.evict(among(pinned)) == expected


def test_sieve_goes_round_before_the_next_key_comes() -> None:
    policy = load_policy("sieve", 2)
    for key in (b"a", b"b"):
        policy.insert(key)
    policy.hit(b"a")
    assert policy.evict(none_pinned) == b"b"  # the newest: the hand is at the end
    policy.insert(b"c")
    assert policy.evict(none_pinned) == b"a"


def test_sieve_marks_what_its_hand_has_passed() -> None:
    policy = load_policy("sieve", 3)
    for key in (b"a", b"b", b"c"):
        policy.insert(key)
    policy.hit(b"a")
    assert policy.evict(none_pinned) == b"b"
    policy.hit(b"a")  # behind the hand
    policy.remove(b"a")
    assert drain(policy) == [b"c"]


@pytest.mark.parametrize(("hits", "leaves"), [(1, b"a"), (2, b"c")])
def test_lfu_takes_a_use_for_what_one_generation_is_worth(hits: int, leaves: bytes) -> None:
    policy = load_policy("lfu", 8)
    policy.insert(b"a")
    for _ in range(hits):
        policy.hit(b"a")
    policy.insert(b"b")
    assert policy.evict(none_pinned) == b"b"
    policy.insert(b"c")  # as much as a, with a use, which waits longer
    assert policy.evict(none_pinned) == leaves


def test_arc_shifts_towards_the_ghosts_that_return() -> None:
    policy = load_policy("arc", 2)
    for key in (b"a", b"b"):
        policy.insert(key)
    policy.hit(b"b")  # a was used once, b twice
    assert policy.evict(none_pinned) == b"a"
    policy.expect(b"a")
    policy.insert(b"a")  # a ghost that returned is often used
    policy.expect(b"c")
    assert policy.evict(none_pinned) == b"b"
    policy.insert(b"c")
    policy.expect(b"d")
    assert policy.evict(none_pinned) == b"a"  # the target is one key used once, and c is that


def test_mq_steps_down_after_a_life() -> None:
    policy = load_policy("mq", 4)
    policy.insert(b"often")
    for _ in range(3):
        policy.hit(b"often")
    for number in range(3):
        policy.insert(bytes([number]))
    assert policy.evict(none_pinned) == bytes([0])
    for number in range(3, 40):  # ages pass; each step down takes a life of four accesses
        policy.insert(bytes([number]))
        if (victim := policy.evict(none_pinned)) == b"often":
            break
    assert victim == b"often"
    assert number > 3 + 4


def test_mq_counts_more_uses_than_it_has_queues_for() -> None:
    policy = load_policy("mq", 1000)
    policy.insert(b"a")
    for _ in range(500):
        policy.hit(b"a")
    policy.insert(b"b")
    assert drain(policy) == [b"b", b"a"]


def test_mq_remembers_the_uses_of_what_left() -> None:
    policy = load_policy("mq", 4)
    policy.insert(b"a")
    policy.hit(b"a")
    assert policy.evict(none_pinned) == b"a"
    policy.insert(b"b")
    policy.insert(b"a")
    assert policy.evict(none_pinned) == b"b"


def test_s3fifo_lets_what_is_seen_once_pass() -> None:
    policy = load_policy("s3fifo", 10)
    policy.insert(b"used")
    policy.hit(b"used")
    policy.hit(b"used")
    for number in range(9):
        policy.insert(bytes([number]))
    assert [policy.evict(none_pinned) for _ in range(3)] == [bytes([n]) for n in range(3)]
    policy.insert(bytes([0]))  # a ghost: straight to the main queue
    assert drain(policy)[-2:] == [b"used", bytes([0])]


def test_s3fifo_lets_go_of_what_just_moved_on() -> None:
    """All that is in the small queue goes on to the main one, of which the rest is pinned."""
    policy = load_policy("s3fifo", 20)
    policy.insert(b"pinned")
    assert policy.evict(none_pinned) == b"pinned"
    policy.insert(b"pinned")  # a ghost: in the main queue
    policy.insert(b"used")
    policy.hit(b"used")
    policy.hit(b"used")
    assert policy.evict(lambda key: key == b"pinned") == b"used"


def test_s3fifo_spares_nobody_for_more_than_three_uses() -> None:
    policy = load_policy("s3fifo", 10)
    for key in (b"a", b"b"):
        policy.insert(key)
        assert policy.evict(none_pinned) == key
    for key, uses in ((b"a", 9), (b"b", 3)):
        policy.insert(key)  # a ghost: in the main queue
        for _ in range(uses):
            policy.hit(key)
    policy.insert(b"new")
    assert [policy.evict(b"new".__eq__) for _ in range(3)] == [b"a", b"b", None]


@pytest.mark.fuzz
@given(numbers=up_to(300, st.integers(0, 5)))
@budget(30)
def test_sketch_counts_few_keys_exactly(numbers: list[int]) -> None:
    """Up to fifteen; every count is halved after ten times the capacity of sightings."""
    sketch, seen, since = FrequencySketch(16), Counter[int](), 0
    for number in numbers:
        sketch.add(bytes([number]))
        seen[number], since = min(15, seen[number] + 1), since + 1
        if since == 160:
            seen, since = Counter({n: count // 2 for n, count in seen.items()}), 80
    assert [sketch.count(bytes([n])) for n in range(6)] == [seen[n] for n in range(6)]


def number_key(number: int) -> bytes:
    return number.to_bytes(2, "big")


def test_sketch_counts_to_fifteen_and_forgets_half_again_and_again() -> None:
    sketch = FrequencySketch(100)
    others = map(number_key, range(2000))
    for _ in range(20):
        sketch.add(b"often")
    assert sketch.count(b"often") == 15
    for sightings, then in ((1000 - 20, 7), (500, 3), (500, 1)):
        before = sketch.count(b"often")
        for _ in range(sightings - 1):
            sketch.add(next(others))
        assert sketch.count(b"often") == before
        sketch.add(next(others))
        assert sketch.count(b"often") == then


def test_sketch_tells_as_many_keys_apart_as_the_pool_has_blocks() -> None:
    sketch, keys = FrequencySketch(100), [number_key(number) for number in range(100)]
    for key in keys:
        sketch.add(key)
    assert [sketch.count(key) for key in keys] == [1] * 100


def test_wtinylfu_keeps_what_was_seen_more_often() -> None:
    policy = load_policy("wtinylfu", 10)
    for number in range(10):
        policy.insert(bytes([number]))
    for number in range(9):
        policy.hit(bytes([number]))
    assert policy.evict(none_pinned) == bytes([9])  # seen once, and in the window
    policy.insert(b"new")
    for _ in range(3):
        policy.hit(b"new")
    assert policy.evict(none_pinned) != b"new"
    assert b"new" in drain(policy)


@pytest.mark.parametrize(("capacity", "leaves"), [(150, 149), (200, 0)])
def test_wtinylfu_spares_what_is_new_while_its_window_has_room(capacity: int, leaves: int) -> None:
    """Of 150 blocks the window has one, of 200 two."""
    policy = load_policy("wtinylfu", capacity)
    for number in range(capacity):
        policy.insert(number_key(number))
    if capacity == 200:
        policy.remove(number_key(198))
    assert policy.evict(none_pinned) == number_key(leaves)


def test_wtinylfu_protects_four_fifths_of_its_main_part() -> None:
    policy = load_policy("wtinylfu", 10)
    for number in range(10):
        policy.insert(number_key(number))
    for number in range(8):  # of which seven are protected: the first is on probation again
        policy.hit(number_key(number))
    assert policy.evict(lambda key: key == number_key(9)) == number_key(8)
    policy.insert(number_key(10))
    assert policy.evict(lambda key: key == number_key(10)) == number_key(0)


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
    assert drain(policy) == [b"once", b"new", b"often"]


def test_lru_freq_remembers_the_uses_of_what_left() -> None:
    policy = load_policy("lru_freq", 4)
    policy.insert(b"a")
    assert policy.evict(none_pinned) == b"a"
    policy.insert(b"b")
    policy.insert(b"a")
    policy.insert(b"c")
    assert drain(policy) == [b"b", b"c", b"a"]


def test_lru_freq_takes_ranks_away_from_what_waits_longer_than_usual() -> None:
    policy = load_policy("lru_freq", 64)
    policy.insert(b"favourite")
    for _ in range(7):
        policy.hit(b"favourite")
    for number in range(64 * 5):  # nothing returns: the usual wait stays at the capacity
        policy.insert(number.to_bytes(2, "big"))
        victim = policy.evict(none_pinned)
        if victim == b"favourite":
            break
    assert victim == b"favourite"
    assert number > 3 * 64  # three ranks, a usual wait each


def test_reuse_distance_is_learned_from_first_returns() -> None:
    reuse = ReuseDistance(1000)
    assert reuse.typical == 1000
    for start in range(0, 60_000, 300):
        keys = [number.to_bytes(4, "big") for number in range(start, start + 300)]
        for key in [*keys, *keys, *keys]:
            reuse.access(key)
    assert 250 <= reuse.typical <= 350
    assert len(reuse._last) <= LEAST_WATCHED


def test_reuse_distance_watches_fewer_keys_of_a_large_pool() -> None:
    reuse = ReuseDistance(32 * MOST_WATCHED)
    for number in range(600_000):  # each returns after 100 000 others
        reuse.access((number // 200_000 * 100_000 + number % 100_000).to_bytes(8, "big"))
    assert 80_000 <= reuse.typical <= 120_000
    assert len(reuse._last) < 300_000 / 16 / 8


WATCHED = [key for key in map(number_key, range(1 << 16)) if crc32(key) % SAMPLE == 0]
UNWATCHED = next(key for key in map(number_key, range(1 << 16)) if crc32(key) % SAMPLE)


def let_return(reuse: ReuseDistance, keys: list[bytes], distance: int) -> None:
    for key in keys:
        reuse.access(key)
        for _ in range(distance - 1):
            reuse.access(UNWATCHED)
        reuse.access(key)


def about(distance: int) -> object:
    return pytest.approx(distance, rel=0.1)


@pytest.mark.fuzz
@given(distances=st.lists(st.sampled_from([1, 8, 64, 512]), min_size=16, max_size=16))
@budget(20)
def test_reuse_distance_is_the_median_of_sixteen_returns(distances: list[int]) -> None:
    reuse = ReuseDistance(1000)
    for number, distance in enumerate(distances):
        assert reuse.typical == 1000
        let_return(reuse, [WATCHED[number]], distance)
    assert reuse.typical == about(sorted(distances)[7])


def test_reuse_distance_forgets_half_after_1024_returns() -> None:
    reuse = ReuseDistance(1000)
    let_return(reuse, WATCHED[:1024], 8)
    let_return(reuse, WATCHED[1024:1536], 64)
    assert reuse.typical == about(8)
    let_return(reuse, WATCHED[1536:1552], 64)
    assert reuse.typical == about(64)


def test_what_all_share_does_not_drown_other_returns() -> None:
    reuse = ReuseDistance(1000)
    for key in WATCHED[1:33]:
        let_return(reuse, [key], 64)
        let_return(reuse, WATCHED[:1] * 10, 8)
    assert reuse.typical == about(64)


@pytest.mark.parametrize("capacity", [10, 1000, 100_000])
def test_a_few_returns_tell_how_long_keys_take(capacity: int) -> None:
    reuse = ReuseDistance(capacity)
    for number in range(1300 if capacity > MOST_WATCHED else 400):
        reuse.access(number_key(number))
        if number >= 64:
            reuse.access(number_key(number - 64))
    assert reuse.typical == about(128)


def test_reuse_distance_watches_what_came_last() -> None:
    reuse = ReuseDistance(1000)
    for number in range(100_000):
        reuse.access(number.to_bytes(4, "big"))
    assert len(reuse._last) == LEAST_WATCHED
    let_return(reuse, WATCHED[:16], 64)
    assert reuse.typical == about(64)


@pytest.mark.parametrize("name", ADMISSIONS)
@pytest.mark.fuzz
@given(accesses=up_to(200, st.tuples(st.integers(0, 30), st.integers(0, 5))))
def test_filters_keep_little(name: str, accesses: list[tuple[int, int]]) -> None:
    admission = ADMISSIONS[name](4)
    for number, position in accesses:
        assert admission.admit(bytes([number]), Place(position, 6)) in (True, False)
        admission.hit(bytes([number]))


@pytest.mark.fuzz
@given(
    count=st.integers(1, 8),
    steps=up_to(200, st.tuples(st.integers(0, 20), st.integers(0, 400))),
)
def test_ghosts_equal_a_list(count: int, steps: list[tuple[int, int]]) -> None:
    """Of no more keys than share one place none is lost."""
    ghosts, puts = Ghosts(count), list[tuple[int, int] | None]()
    for key, number in steps:
        known = [put for put in puts[-count:] if put is not None and put[0] == key]
        assert ghosts.pop(bytes([key])) == (min(255, known[0][1]) if known else None)
        puts = [None if put in known else put for put in puts]
        if number % 3:
            ghosts.put(bytes([key]), number)
            puts.append((key, number))


def test_ghosts_lose_one_key_in_hundreds() -> None:
    ghosts = Ghosts(10_000)
    for number in range(100_000):
        ghosts.put(number.to_bytes(8, "big"), 1)
    too_old = range(90_000 - 10_000 // 16 - 1000, 90_000 - 10_000 // 16 - 1)
    assert all(ghosts.pop(number.to_bytes(8, "big")) is None for number in too_old)
    found = [ghosts.pop(number.to_bytes(8, "big")) for number in range(90_000, 100_000)]
    assert 9900 < found.count(1) < 10_000


def test_ghosts_grow_too_old() -> None:
    """Also where a sixteenth of the count is no whole number."""
    ghosts, keys = Ghosts(9_999), [number.to_bytes(8, "big") for number in range(20_000)]
    for key in keys:
        ghosts.put(key, 1)
    found = [ghosts.pop(key) for key in keys[:9_999]]
    assert found.count(None) > 9_990  # some are taken for others


def test_a_miniature_hits_what_a_pool_would() -> None:
    capacity = 30_000
    sample = Sample(capacity)
    assert sample.blocks < capacity / 10
    pool, miniature = Miniature(capacity), Miniature(sample.blocks)
    draw = random.Random(0)
    for _ in range(200_000):
        key = int(2 * capacity * draw.random() ** 2).to_bytes(8, "big")
        pool.access(key, admitted=True)
        if key in sample:
            miniature.access(key, admitted=True)
    share = sample.blocks / capacity
    assert miniature.hits / share == pytest.approx(pool.hits, rel=0.1)


@pytest.mark.parametrize("capacity", [1, MOST_BLOCKS])
def test_a_small_pool_is_its_own_miniature(capacity: int) -> None:
    sample = Sample(capacity)
    assert sample.blocks == capacity
    assert all(number_key(number) in sample for number in range(1000))


def test_a_miniature_is_filled_before_it_refuses() -> None:
    miniature = Miniature(2)
    for key in (b"a", b"b", b"c", b"a", b"b", b"c"):
        miniature.access(key, admitted=False)
    assert miniature.hits == 2


@pytest.mark.parametrize("name", ["second_sight", "tinylfu"])
def test_second_sight_decides(name: str) -> None:
    admission = ADMISSIONS[name](100)
    assert not admission.admit(b"a", Place())
    assert admission.admit(b"a", Place())
    assert not admission.admit(b"b", Place())


def flood(capacity: int, returning: bool) -> list[bool]:
    """Whether the last of many new requests of eight blocks was stored, block by block."""
    admission = ADMISSIONS["adaptive"](capacity)
    for number in range(4000):
        old = number - 313  # 3756 accesses ago: in the middle of what is told apart
        if returning and old >= 0 and old % 2:
            for position in range(8):
                admission.admit(f"{old}.{position}".encode(), Place(position, 9))
        answers = [admission.admit(f"{number}.{p}".encode(), Place(p, 9)) for p in range(8)]
    return answers


def test_adaptive_stores_what_fits_until_it_returns() -> None:
    assert all(flood(200_000, returning=True))
    some = flood(2_000, returning=True)
    assert not all(some)
    assert some == sorted(some, reverse=True)  # leading blocks only
    assert not any(flood(20, returning=True))


def test_adaptive_learns_that_last_blocks_do_not_return() -> None:
    admission = ADMISSIONS["adaptive"](100_000)
    for number in range(200):
        for turn in range(2):  # the last block of a turn is not part of the next
            keys = [f"{number}.{i}".encode() for i in range(4)] + [f"{number}.{turn}e".encode()]
            stored = [admission.admit(key, Place(i, 5)) for i, key in enumerate(keys)]
    assert stored == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("one_in", "stored"),
    [
        pytest.param(1000, False, id="never"),
        pytest.param(20, False, id="seldom"),
        pytest.param(5, True, id="often"),
    ],
)
def test_adaptive_judges_last_blocks_once_32_were_seen(one_in: int, stored: bool) -> None:
    """By how many of them return, while all first blocks do."""
    admission, answers = ADMISSIONS["adaptive"](1000), []
    for number in range(3000):
        first, last = f"{number}.0".encode(), f"{number}.1".encode()
        admission.admit(first, Place(0, 2))
        answers.append(admission.admit(last, Place(1, 2)))
        for key in (first, last) if number % one_in == 1 else (first,):
            admission.admit(key, Place())
    assert answers[:31] == [True] * 31
    assert set(answers[31:]) == {stored}


def test_adaptive_bears_a_pool_of_nothing() -> None:
    admission = Adaptive(0)
    admission.admit(b"a", Place())
    admission.hit(b"a")


def test_what_is_used_enters_every_miniature_but_that_which_hardly_stores() -> None:
    admission = Adaptive(1)
    admission.admit(b"a", Place())
    for _ in range(3):
        admission.hit(b"b")
    assert [rival.hits for rival in admission._contest.rivals] == [0, 2, 2, 2]


def test_what_comes_again_enters_every_miniature_but_that_which_hardly_stores() -> None:
    admission = Adaptive(1)
    for key in (b"a", b"b", b"b"):
        admission.admit(key, Place(0, 9))
    admission.hit(b"b")
    assert [rival.hits for rival in admission._contest.rivals] == [0, 1, 2, 2]


def test_adaptive_stores_the_end_of_a_long_request() -> None:
    assert Adaptive(100_000).admit(b"a", Place(100_000, 200_000))


def test_adaptive_takes_no_only_block_for_a_last_one() -> None:
    admission = Adaptive(100_000)
    for number in range(200):  # of which none returns, while what has others behind it does
        assert admission.admit(f"{number}".encode(), Place())
        for _ in range(2):
            admission.admit(f"{number}.0".encode(), Place(0, 2))


class Traffic:
    """Blocks of requests, of which a pool of 100 keeps few."""

    def __init__(self) -> None:
        self.admission = Adaptive(100)
        self.number = 2000

    def ask(self, number: int) -> bool:
        return self.admission.admit(number.to_bytes(4, "big"), Place(number % 400, 400))

    def late_or_at_once(self, blocks: int) -> None:
        """Most of what returns takes too long, which hides that the rest returns at once."""
        for number in range(self.number, self.number + blocks):
            self.ask(number)
            self.ask(number - (2000 if number % 5 else 10))
        self.number += blocks

    def once(self, blocks: int, favourites: int = 0) -> None:
        """Some return at once; favourites are used in every turn."""
        for number in range(self.number, self.number + blocks):
            self.ask(number)
            if number % 20 == 0:
                self.ask(number)
            if number % 300 < favourites:
                self.use(number % 300)
        self.number += blocks

    def use(self, favourite: int) -> None:
        self.admission.hit(b"favourite %d" % favourite)

    def is_stored(self, position: int) -> bool:
        self.number += 1
        return self.admission.admit(b"%d" % self.number, Place(position, 400))


def test_adaptive_stores_everything_while_that_has_more_hits() -> None:
    traffic = Traffic()
    traffic.late_or_at_once(8000)
    assert traffic.is_stored(399)
    for _ in range(5000):
        traffic.use(0)  # a hit of all three: the lead is small
    assert traffic.is_stored(399)
    traffic.once(9000, favourites=60)
    assert not traffic.is_stored(399)


def test_adaptive_stores_nothing_new_while_that_has_more_hits() -> None:
    traffic = Traffic()
    traffic.once(9000, favourites=60)
    assert not traffic.is_stored(0)
    traffic.once(17_000)  # an old lead wears off
    assert traffic.is_stored(0)


def test_adaptive_gives_half_of_the_pool_to_the_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less twice what comes again in the usual wait."""
    assert flood(8000, returning=False) == [True] * 4 + [False] * 4
    monkeypatch.setattr(contest, "LEADS", (math.inf, math.inf, 1, math.inf))  # the reckoning alone
    half = 3756 * (2 * 4 / 12 + 4.5 / 12)  # of twelve accesses four come again
    assert flood(int(2 * half), returning=True) == [True] * 4 + [False] * 4
