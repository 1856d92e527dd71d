"""OffloadScheduler: what becomes readable when, over several ranks, failures and resets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvortex.checksum import seed_of
from kvortex.core import Job, StepReport
from kvortex.metrics import MissReason
from kvortex.policies import LRU
from kvortex.prefix_match import Reach, longest_prefix
from kvortex.scheduler import OffloadScheduler
from kvortex.tiers import HostTier

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

A, B, C, D = b"a", b"b", b"c", b"d"


def scheduler(num_slots: int = 4, num_ranks: int = 1) -> OffloadScheduler:
    return OffloadScheduler(HostTier(num_slots, LRU(num_slots)), num_ranks)


def match(keeper: OffloadScheduler, keys: Sequence[bytes]) -> int:
    """How many leading keys are readable."""
    return longest_prefix(keeper.tier.readable, [keys], [Reach()], 0, 1)


def report(*jobs: Job | None, failed: Iterable[Job | None] = ()) -> StepReport:
    """One rank is done with these."""
    numbers = [job.id for job in jobs if job is not None]
    return StepReport(
        dict.fromkeys(numbers, 1), frozenset(job.id for job in failed if job is not None)
    )


def planned_store(keeper: OffloadScheduler, keys: Sequence[bytes], ids: Sequence[int]) -> Job:
    job = keeper.store(keys, ids)
    assert job is not None
    return job


def planned_load(keeper: OffloadScheduler, keys: Sequence[bytes], ids: Sequence[int]) -> Job:
    job = keeper.load(keys, ids)
    assert job is not None
    return job


def stored(keeper: OffloadScheduler, *keys: bytes) -> None:
    job = planned_store(keeper, keys, range(len(keys)))
    keeper.settle(StepReport({job.id: 99}))
    assert match(keeper, keys) == len(keys)


def counts(keeper: OffloadScheduler) -> tuple[int, int, int]:
    index = keeper.tier.index
    index.check()
    return index.free, index.reserved, index.resident


def test_store_is_readable_once_reported() -> None:
    keeper = scheduler()
    job = planned_store(keeper, [A, B], [7, 3])
    assert job.block_ids.tolist() == [7, 3]
    assert len(set(job.slots.tolist())) == 2
    assert (match(keeper, [A, B]), keeper.wants(A), keeper.pending) == (0, False, True)
    (flight,) = keeper.settle(report(job))
    assert (flight.job, flight.failed, flight.discard) == (job, False, False)
    assert (match(keeper, [A, B]), keeper.wants(A), keeper.pending) == (2, False, False)
    assert keeper.counters.stored_blocks == 2


def test_match_stops_at_the_first_miss() -> None:
    keeper = scheduler()
    stored(keeper, A, C)
    assert match(keeper, [A, B, C]) == 1
    assert match(keeper, [B, A]) == 0
    assert match(keeper, []) == 0


def test_plan_is_taken_once() -> None:
    keeper = scheduler()
    store = planned_store(keeper, [A], [0])
    plan = keeper.take_plan()
    assert (plan.loads, plan.stores, plan.has_forward) == ((), (store,), True)
    assert keeper.take_plan(has_forward=False).stores == ()
    keeper.settle(report(store))
    load = planned_load(keeper, [A], [5])
    plan = keeper.take_plan(has_forward=False)
    assert (plan.loads, plan.stores, plan.has_forward) == ((load,), (), False)
    assert load.slots.tolist() == store.slots.tolist()
    assert load.id != store.id


def test_readable_only_after_every_rank_reported() -> None:
    keeper = scheduler(num_ranks=3)
    job = planned_store(keeper, [A], [0])
    for _ in range(2):
        assert keeper.settle(report(job)) == []
        assert match(keeper, [A]) == 0
    assert [flight.job for flight in keeper.settle(report(job))] == [job]
    assert match(keeper, [A]) == 1


def test_ranks_may_report_together() -> None:
    keeper = scheduler(num_ranks=3)
    job = planned_store(keeper, [A], [0])
    keeper.settle(report(job).merge(report(job)).merge(StepReport()))
    assert match(keeper, [A]) == 0
    keeper.settle(report(job))
    assert match(keeper, [A]) == 1


@pytest.mark.parametrize("bad_rank", [0, 1, 2])
def test_one_failing_rank_fails_the_store(bad_rank: int) -> None:
    keeper = scheduler(num_ranks=3)
    job = planned_store(keeper, [A, B], [0, 1])
    for rank in range(3):
        done = keeper.settle(report(job, failed=[job] if rank == bad_rank else []))
        assert bool(done) is (rank == 2)
    assert done[0].failed
    assert match(keeper, [A]) == 0
    assert counts(keeper) == (4, 0, 0)
    assert keeper.counters.failed_stores == 2


def test_slots_are_held_until_the_last_rank_is_done() -> None:
    keeper = scheduler(num_ranks=2)
    job = planned_store(keeper, [A, B, C, D], [0, 1, 2, 3])
    keeper.settle(report(job, failed=[job]))
    assert keeper.store([b"e"], [0]) is None
    keeper.settle(report(job))
    assert counts(keeper) == (4, 0, 0)


def test_store_takes_what_slots_there_are() -> None:
    keeper = scheduler(num_slots=3)
    first = planned_store(keeper, [A, B], [0, 1])
    second = planned_store(keeper, [C, D], [2, 3])
    assert second.block_ids.tolist() == [2]
    assert keeper.counters.refused_stores == 1
    assert keeper.store([D], [3]) is None
    assert keeper.counters.refused_stores == 2
    keeper.settle(report(first, second))
    assert match(keeper, [A, B, C]) == 3
    assert keeper.wants(D)


def test_loaded_block_is_not_evicted() -> None:
    keeper = scheduler(num_slots=1)
    stored(keeper, A)
    load = keeper.load([A], [0])
    assert keeper.store([B], [1]) is None
    keeper.settle(report(load))
    assert keeper.counters.loaded_blocks == 1
    assert keeper.store([B], [1]) is not None


def test_lost_source() -> None:
    """vLLM was promised a block that is gone when the load is planned: it must compute it again."""
    keeper = scheduler()
    stored(keeper, A)
    job = planned_load(keeper, [A, B, C], [7, 8, 9])
    assert job.block_ids.tolist() == [7]
    assert keeper.take_plan().lost_block_ids == (8, 9)
    assert keeper.take_plan().lost_block_ids == ()
    assert keeper.load([B], [5]) is None
    assert keeper.take_plan().lost_block_ids == (5,)


def test_failed_load_forgets_its_keys_only() -> None:
    keeper = scheduler()
    stored(keeper, A, B, C)
    job = keeper.load([A, B], [0, 1])
    keeper.settle(report(job, failed=[job]))
    assert [match(keeper, [key]) for key in (A, B, C)] == [0, 0, 1]
    assert counts(keeper) == (3, 0, 1)
    assert (keeper.counters.failed_loads, keeper.counters.loaded_blocks) == (2, 0)


def corrupt(job: Job, *positions: int) -> StepReport:
    return StepReport({job.id: 1}, corrupt={job.id: frozenset(positions)})


def test_a_corrupt_block_is_forgotten_and_its_slot_used_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    keeper = scheduler()
    stored(keeper, A, B, C)
    load = planned_load(keeper, [A, B, C], [0, 1, 2])
    slot = int(load.slots[1])
    (flight,) = keeper.settle(corrupt(load, 1))
    assert (flight.failed, flight.bad, flight.corrupt) == (True, {1}, {1})
    assert [match(keeper, [key]) for key in (A, B, C)] == [1, 0, 1]
    assert counts(keeper) == (1, 0, 2)
    assert (keeper.tier.index.num_slots, keeper.tier.index.quarantined) == (3, 1)
    counted = keeper.counters
    assert (counted.corrupt_blocks, counted.failed_loads, counted.loaded_blocks) == (1, 1, 2)
    assert keeper.why_missing(B) is MissReason.FAILED
    for number in range(20):
        again = planned_store(keeper, [b"%d" % number], [number])
        assert slot not in again.slots.tolist()
        keeper.settle(report(again))
    load = planned_load(keeper, [b"19"], [3])
    keeper.settle(corrupt(load, 0))
    assert counts(keeper) == (0, 0, 2)
    (record,) = [one for one in caplog.records if "other bytes" in one.getMessage()]
    assert B.hex() in record.getMessage()
    assert f"host slot {slot}" in record.getMessage()


def test_a_corrupt_block_that_was_evicted_meanwhile_is_quarantined_too() -> None:
    keeper = scheduler(num_slots=2)
    stored(keeper, A, B)
    load = planned_load(keeper, [A], [0])
    keeper.reset()
    keeper.settle(corrupt(load, 0))
    assert counts(keeper) == (1, 0, 0)
    assert keeper.tier.index.quarantined == 1


def test_corrupt_on_one_rank_is_corrupt() -> None:
    keeper = scheduler(num_ranks=2)
    stored(keeper, A, B)
    load = planned_load(keeper, [A, B], [0, 1])
    under_way = planned_store(keeper, [C], [2])
    keeper.settle(report(load).merge(corrupt(load, 0)).merge(report(under_way)))
    assert [match(keeper, [key]) for key in (A, B)] == [0, 1]
    (flight,) = keeper.settle(report(under_way))
    assert flight.discard  # it may have read what the forward computed from wrong bytes


def test_who_waits_for_what_is_gone_is_named() -> None:
    keeper = scheduler()
    stored(keeper, A)
    keeper.load([A, B], [3, 4])
    keeper.load([A], [5], "whole")
    keeper.load([A, B], [6, 7], "in part")
    keeper.load([B], [8], "gone")
    plan = keeper.take_plan()
    assert plan.lost_block_ids == (4, 7, 8)
    assert plan.lost_requests == ("in part", "gone")
    assert [job.request_id for job in plan.loads] == [None, "whole", "in part", "gone"]
    assert keeper.take_plan().lost_requests == ()


def test_the_first_corrupt_block_is_told_with_its_place(caplog: pytest.LogCaptureFixture) -> None:
    keeper = scheduler()
    stored(keeper, A, B)
    for key, where in ((A, "in layer 7"), (B, "")):
        job = planned_load(keeper, [key], [0])
        keeper.settle(
            StepReport({job.id: 1}, corrupt={job.id: frozenset({0})}, corrupt_layers=where)
        )
    (told,) = caplog.messages
    assert A.hex() in told
    assert "in layer 7" in told
    assert keeper.counters.corrupt_blocks == 2


def test_each_key_starts_its_checksum_elsewhere() -> None:
    keeper = scheduler()
    job = planned_store(keeper, [A, B], [0, 1])
    assert job.seeds is not None
    assert job.seeds.tolist() == [seed_of(A), seed_of(B)]
    keeper.settle(report(job))
    load = planned_load(keeper, [B], [5])
    assert load.seeds is not None
    assert load.seeds.tolist() == [seed_of(B)]


def test_layers_that_did_not_wait_doom_every_store_under_way() -> None:
    keeper = scheduler()
    stored(keeper, A)
    under_way = keeper.store([B], [1])
    keeper.settle(StepReport(unwaited_layers=2))
    keeper.settle(report(under_way))
    assert (match(keeper, [A]), match(keeper, [B])) == (1, 0)
    assert (keeper.counters.unwaited_layers, keeper.counters.discarded_stores) == (2, 1)
    keeper.settle(report(keeper.store([B], [1])))
    assert match(keeper, [B]) == 1


def test_failed_load_dooms_every_store_under_way() -> None:
    keeper = scheduler()
    stored(keeper, A)
    earlier, load, later = keeper.store([B], [1]), keeper.load([A], [0]), keeper.store([C], [2])
    keeper.settle(report(load, failed=[load]))
    flights = keeper.settle(report(earlier, later))
    assert [flight.discard for flight in flights] == [True, True]
    assert match(keeper, [B]) == match(keeper, [C]) == 0
    assert counts(keeper) == (4, 0, 0)
    assert (keeper.counters.discarded_stores, keeper.counters.failed_stores) == (2, 0)
    after = keeper.store([D], [3])
    keeper.settle(report(after))
    assert match(keeper, [D]) == 1


@pytest.mark.parametrize("store_first", [True, False])
def test_failed_load_dooms_a_store_of_the_same_report(store_first: bool) -> None:
    keeper = scheduler()
    stored(keeper, A)
    jobs = [keeper.store([B], [1]), keeper.load([A], [0])]
    keeper.settle(report(*(jobs if store_first else jobs[::-1]), failed=[jobs[1]]))
    assert match(keeper, [B]) == 0
    assert counts(keeper) == (4, 0, 0)


def test_failed_load_dooms_stores_before_its_other_ranks_report() -> None:
    keeper = scheduler(num_ranks=2)
    stored(keeper, A)
    load, store = keeper.load([A], [0]), keeper.store([B], [1])
    keeper.settle(report(load, store, failed=[load]))
    keeper.settle(report(store))
    assert match(keeper, [B]) == 0
    assert match(keeper, [A]) == 1
    keeper.settle(report(load))
    assert match(keeper, [A]) == 0
    assert counts(keeper) == (4, 0, 0)


def test_failed_store_dooms_nothing_else() -> None:
    keeper = scheduler()
    bad, good = keeper.store([A], [0]), keeper.store([B], [1])
    keeper.settle(report(bad, failed=[bad]))
    keeper.settle(report(good))
    assert [match(keeper, [A]), match(keeper, [B])] == [0, 1]


def test_failed_load_spares_a_newer_block_of_its_key() -> None:
    keeper = scheduler()
    stored(keeper, A)
    load = keeper.load([A], [0])
    stored(keeper, A)
    assert counts(keeper) == (2, 1, 1)
    keeper.settle(report(load, failed=[load]))
    assert match(keeper, [A]) == 1
    assert counts(keeper) == (3, 0, 1)


def test_reset_with_stores_and_loads_under_way() -> None:
    keeper = scheduler()
    stored(keeper, A, B)
    load, store = keeper.load([A], [0]), keeper.store([C], [1])
    keeper.reset()
    assert [match(keeper, [key]) for key in (A, B, C)] == [0, 0, 0]
    assert counts(keeper) == (2, 2, 0)
    keeper.settle(report(load, store))
    assert [match(keeper, [key]) for key in (A, B, C)] == [0, 0, 0]
    assert counts(keeper) == (4, 0, 0)
    assert keeper.counters.discarded_stores == 1
    stored(keeper, A)


def test_reports_of_unknown_jobs_are_ignored() -> None:
    keeper = scheduler()
    store = planned_store(keeper, [A], [0])
    assert keeper.settle(StepReport({99: 1, store.id: 1}, frozenset({98}))) != []
    assert keeper.settle(report(store, failed=[store])) == []
    assert match(keeper, [A]) == 1


def test_failures_are_logged_once_each(caplog: pytest.LogCaptureFixture) -> None:
    keeper = scheduler()
    for _ in range(3):
        stored(keeper, A)
        load, store = keeper.load([A], [0]), keeper.store([B], [1])
        keeper.settle(report(load, store, failed=[load, store]))
    assert len(caplog.records) == 2


def test_the_smallest_pool_of_all_ranks_is_the_limit() -> None:
    keeper = scheduler(4, num_ranks=2)
    keeper.settle(StepReport(num_slots=4).merge(StepReport(num_slots=2)).merge(StepReport()))
    job = planned_store(keeper, [A, B, b"c"], [1, 2, 3])
    assert sorted(job.slots.tolist()) == [0, 1]
    assert keeper.counters.refused_stores == 1
    assert keeper.tier.index.num_slots == 2
    assert keeper.counters.lost_slots == 2


def test_slots_are_given_out_once_every_rank_has_them() -> None:
    keeper = scheduler(8, num_ranks=2)
    keeper.settle(StepReport(num_slots=8).merge(StepReport(num_slots=8, ready_slots=2)))
    first = planned_store(keeper, [A, B, C], [1, 2, 3])
    assert sorted(first.slots.tolist()) == [0, 1]
    keeper.settle(StepReport(ready_slots=4).merge(StepReport()))
    assert sorted(planned_store(keeper, [C, D, b"e"], [3, 4, 5]).slots.tolist()) == [2, 3]
    keeper.settle(StepReport(num_slots=6, ready_slots=6).merge(StepReport(ready_slots=5)))
    assert planned_store(keeper, [b"e", b"f"], [5, 6]).slots.tolist() == [4]
    keeper.settle(StepReport(ready_slots=8))
    assert planned_store(keeper, [b"f", b"g"], [6, 7]).slots.tolist() == [5]
    assert keeper.counters.lost_slots == 2
    keeper.tier.index.check()


def test_a_store_into_slots_that_were_not_ready_is_only_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the first step nobody has told yet how many there are."""
    keeper = scheduler(4)
    job = planned_store(keeper, [A, B, C], [0, 1, 2])
    keeper.settle(StepReport({job.id: 1}, frozenset({job.id}), num_slots=4, ready_slots=2))
    assert counts(keeper) == (2, 0, 0)
    stored(keeper, A, B)
    assert counts(keeper) == (0, 0, 2)
    keeper.settle(StepReport(ready_slots=4))
    assert counts(keeper) == (2, 0, 2)
