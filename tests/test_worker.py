"""Worker: carries out plans, never raises for a copy, keeps nothing of a step that went wrong."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from doubles import CommandedCopyEngine, commanded, open_commanded

from kvortex.core import Direction, Job, StepPlan, StepReport
from kvortex.host_pool import HostPool
from kvortex.layout import make_layout
from kvortex.verification import verification_of
from kvortex.worker import Worker


@pytest.fixture
def engine() -> CommandedCopyEngine:
    engine = commanded()
    page = engine.layout.pages[0].view
    for number in range(len(page)):
        page[number] = number + 1
        engine.pool.bytes[number] = 100 + number
    return engine


class Growing(HostPool):
    """As many slots are ready as the test says."""

    num_slots = num_ready_slots = 0

    def __init__(self, num_slots: int, ready: int) -> None:
        super().__init__(num_slots, 16, pinned=False)
        self.num_slots, self.num_ready_slots = num_slots, ready


def job(number: int, *pairs: tuple[int, int]) -> Job:
    blocks, slots = zip(*pairs, strict=True)
    return Job(number, np.array(blocks, np.int64), np.array(slots, np.int64))


def finished(*numbers: int) -> dict[int, int]:
    return dict.fromkeys(numbers, 1)


def running(engine: CommandedCopyEngine) -> Worker:
    """A worker that has told how many slots it has."""
    worker = Worker(engine)
    report = worker.report()
    assert report == StepReport(num_slots=8)
    assert report
    return worker


def test_speeds_are_in_every_report_once_known(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    engine._speedometers[Direction.LOAD].note(100, 2.0)
    engine._speedometers[Direction.STORE].note(100, 4.0)
    assert worker.report() == StepReport(load_bytes_per_s=50.0, store_bytes_per_s=25.0)
    assert worker.report() == StepReport(load_bytes_per_s=50.0, store_bytes_per_s=25.0)


def test_the_slowest_link_counts() -> None:
    fast, slow = StepReport(load_bytes_per_s=9.0), StepReport(load_bytes_per_s=5.0)
    both = fast.merge(slow).merge(StepReport(store_bytes_per_s=7.0))
    assert both == StepReport(load_bytes_per_s=5.0, store_bytes_per_s=7.0)


def test_empty_plan_copies_nothing(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    worker.begin(StepPlan())
    worker.store()
    assert engine.tickets == []
    assert worker.report() == StepReport()
    assert not worker.report()


def test_loads_start_at_once_in_one_copy_and_are_fenced(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    worker.begin(StepPlan(loads=(job(1, (0, 5)), job(2, (2, 6), (1, 0)))))
    assert engine.directions == [Direction.LOAD]
    assert engine.fenced == engine.tickets
    assert worker.report() == StepReport()
    assert worker.tickets() == {1: engine.tickets[0], 2: engine.tickets[0]}
    engine.tickets[0].finish()
    assert worker.report() == StepReport(finished(1, 2))
    assert worker.report() == StepReport()
    assert worker.tickets() == {}
    view = engine.layout.pages[0].view
    assert view[:4, 0].tolist() == [105, 100, 106, 4]


def test_stores_wait_for_the_forward_pass(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    worker.begin(StepPlan(stores=(job(1, (0, 5)), job(2, (3, 6)))))
    assert engine.tickets == []
    worker.store()
    assert engine.directions == [Direction.STORE]
    assert engine.fenced == []
    engine.tickets[0].finish()
    assert engine.pool.bytes[:, 0].tolist() == [100, 101, 102, 103, 104, 1, 4, 107]
    worker.store()
    assert len(engine.tickets) == 1
    assert worker.report() == StepReport(finished(1, 2))


def test_stores_start_at_once_without_a_forward_pass(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    worker.begin(StepPlan(loads=(job(1, (0, 5)),), stores=(job(2, (3, 6)),), has_forward=False))
    assert engine.directions == [Direction.LOAD, Direction.STORE]


def test_a_refused_load_is_data(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    engine.refuse = True
    worker.begin(StepPlan(loads=(job(1, (0, 5)), job(2, (2, 6), (1, 0)))))
    assert engine.fenced == []
    assert worker.report() == StepReport(finished(1, 2), frozenset({1, 2}))
    assert worker.take_bad_blocks() == {0, 1, 2}
    assert worker.take_bad_blocks() == set()


def test_a_refused_store_is_data(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    engine.refuse = True
    worker.begin(StepPlan(stores=(job(1, (0, 5)),)))
    worker.store()
    assert worker.report() == StepReport(finished(1), frozenset({1}))
    assert worker.take_bad_blocks() == set()
    assert worker.report() == StepReport()


def test_a_load_that_fails_later_is_data(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    worker.begin(StepPlan(loads=(job(1, (4, 5)),)))
    worker.begin(StepPlan(loads=(job(2, (6, 5)),)))
    engine.tickets[0].fail()
    engine.tickets[1].finish()
    assert worker.report() == StepReport(finished(1, 2), frozenset({1}))
    assert worker.take_bad_blocks() == {4}


def verifying(num_slots: int = 8) -> CommandedCopyEngine:
    layout = make_layout({"a": torch.arange(128, dtype=torch.uint8).view(8, 16)})
    pool = HostPool(num_slots, layout.slot_bytes, pinned=False)
    return open_commanded(layout, pool, 1, verification_of(layout, "always"))


def test_corrupt_blocks_are_named_and_good_ones_are_not() -> None:
    engine = verifying()
    worker = running(engine)
    worker.begin(StepPlan(stores=(job(1, (0, 5), (1, 6), (2, 7)),), has_forward=False))
    engine.tickets[0].finish()
    worker.report()
    engine.pool.bytes[6] += 1
    worker.begin(StepPlan(loads=(job(2, (4, 5), (5, 6)), job(3, (6, 7)))))
    engine.tickets[1].finish()
    assert worker.take_bad_blocks() == {5}
    assert worker.report() == StepReport(finished(2, 3), corrupt={2: frozenset({1})})
    assert worker.report() == StepReport()
    assert worker.take_bad_blocks() == set()


def loading_what_turns_out_wrong() -> tuple[Worker, CommandedCopyEngine]:
    """A step is under way that waits for a load, of which block 5 will not be what was stored."""
    engine = verifying()
    worker = running(engine)
    worker.begin(StepPlan(stores=(job(1, (0, 5), (1, 6)),), has_forward=False))
    engine.tickets[0].finish()
    worker.report()
    engine.pool.bytes[6] += 1
    worker.begin(StepPlan(loads=(job(2, (4, 5), (5, 6)),)))
    return worker, engine


def test_who_looks_for_bad_blocks_waits_for_the_loads_of_that_step() -> None:
    """In another thread, while the next step is prepared, which has bad blocks of its own."""
    worker, engine = loading_what_turns_out_wrong()
    bad = worker.take_bad_blocks()
    assert worker.report() == StepReport()
    worker.begin(StepPlan(lost_block_ids=(7,)))
    engine.tickets[1].finish()
    with ThreadPoolExecutor(1) as elsewhere:
        assert pickle.loads(elsewhere.submit(pickle.dumps, bad).result()) == {5}
    assert worker.take_bad_blocks() == {7}
    assert worker.report() == StepReport(finished(2), corrupt={2: frozenset({1})})


@pytest.mark.parametrize("polled", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_bad_blocks_belong_to_the_step_that_loaded_them(*, polled: bool, fails: bool) -> None:
    worker, engine = loading_what_turns_out_wrong()
    bad = worker.take_bad_blocks()
    (engine.tickets[1].fail if fails else engine.tickets[1].finish)()
    if polled:  # by a later step, before anybody looked
        worker.take_arrived()
    assert worker.take_bad_blocks() == set()
    for _ in range(2):
        assert bad == ({4, 5} if fails else {5})
    assert {9} | bad == {9, *bad}  # as vLLM unites those of several ranks and connectors
    assert len(bad) == len(list(bad))
    assert 5 in bad


def test_the_next_step_does_not_take_over_what_is_still_under_way() -> None:
    """vLLM asks for its bad blocks before it looks into those of the step before."""
    worker, engine = loading_what_turns_out_wrong()
    bad = worker.take_bad_blocks()
    worker.begin(StepPlan(lost_block_ids=(7,)))
    later = worker.take_bad_blocks()
    engine.tickets[1].finish()
    assert later == {7}
    assert bad == {5}


def test_a_step_without_bad_blocks_has_none() -> None:
    worker, engine = loading_what_turns_out_wrong()
    engine.pool.bytes[6] -= 1
    bad = worker.take_bad_blocks()
    engine.tickets[1].finish()
    assert not bad


def test_a_request_whose_own_load_is_corrupt_has_failed() -> None:
    engine = verifying()
    worker = running(engine)
    worker.begin(StepPlan(stores=(job(1, (0, 5)),), has_forward=False))
    engine.tickets[0].finish()
    worker.report()
    nothing = np.array([], np.int64)
    wrong_key = Job(2, np.array([4]), np.array([5]), "r", np.array([17]))
    worker.begin(StepPlan(loads=(wrong_key, Job(3, nothing, nothing, "s"))))
    assert not worker.take_bad_blocks()  # nobody waits for those that no forward waits for
    assert worker.take_arrived() == {"s"}
    engine.tickets[1].finish()
    assert worker.take_arrived() == {"r"}
    assert worker.take_failed_requests() == {"r"}
    assert worker.take_bad_blocks() == {4}
    assert worker.report().corrupt == {2: frozenset({0})}


def test_a_request_whose_source_is_gone_in_part_has_failed(engine: CommandedCopyEngine) -> None:
    """Once the rest has arrived; vLLM is told of no block where a model has several groups."""
    worker = running(engine)
    nothing = np.array([], np.int64)
    waiting = replace(job(1, (4, 5)), request_id="r"), Job(2, nothing, nothing, "s")
    worker.begin(StepPlan(waiting, lost_block_ids=(6, 7), lost_requests=("r", "s")))
    assert worker.take_arrived() == worker.take_failed_requests() == {"s"}
    engine.tickets[0].finish()
    assert worker.take_arrived() == worker.take_failed_requests() == {"r"}
    worker.begin(StepPlan((replace(job(3, (4, 5)), request_id="r"),)))
    engine.tickets[1].finish()
    assert worker.take_arrived() == {"r"}
    assert worker.take_failed_requests() == set()


def test_a_store_that_fails_later_is_data(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    worker.begin(StepPlan(stores=(job(1, (4, 5)),), has_forward=False))
    engine.tickets[0].fail()
    assert worker.report() == StepReport(finished(1), frozenset({1}))
    assert worker.take_bad_blocks() == set()


@pytest.mark.parametrize("has_forward", [True, False])
def test_stores_of_a_step_with_a_failed_load_are_not_launched(
    engine: CommandedCopyEngine, has_forward: bool
) -> None:
    worker = running(engine)
    plan = StepPlan((job(1, (0, 99)),), (job(2, (3, 6)),), has_forward)
    worker.begin(plan)
    worker.store()
    assert engine.tickets == []
    assert worker.report() == StepReport(finished(1, 2), frozenset({1, 2}))


def test_stores_of_a_step_with_a_lost_source_are_not_launched(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    worker.begin(StepPlan(stores=(job(2, (3, 6)),), lost_block_ids=(7, 5)))
    worker.store()
    assert engine.tickets == []
    assert worker.take_bad_blocks() == {5, 7}
    assert worker.report() == StepReport(finished(2), frozenset({2}))


def test_the_next_step_stores_again(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    worker.begin(StepPlan(lost_block_ids=(7,)))
    worker.take_bad_blocks()
    worker.begin(StepPlan(stores=(job(2, (3, 6)),)))
    worker.store()
    assert engine.directions == [Direction.STORE]


@pytest.mark.parametrize("direction", list(Direction))
def test_slots_that_are_not_ready_yet(
    engine: CommandedCopyEngine, direction: Direction, caplog: pytest.LogCaptureFixture
) -> None:
    engine.pool = Growing(8, ready=3)
    worker = Worker(engine)
    assert worker.report() == StepReport(num_slots=8, ready_slots=3)
    jobs = (job(1, (0, 3)),)
    loads = jobs if direction is Direction.LOAD else ()
    stores = jobs if direction is Direction.STORE else ()
    worker.begin(StepPlan(loads, stores, has_forward=False))
    assert engine.tickets == []
    assert worker.report().failed == {1}
    assert caplog.records == []
    engine.pool.num_ready_slots = 4
    worker.begin(StepPlan(loads, stores, has_forward=False))
    assert engine.directions == [direction]


def test_a_growing_pool_is_told_until_it_is_ready(engine: CommandedCopyEngine) -> None:
    """Also in steps in which it did not grow: another rank's report would hide it."""
    engine.pool = pool = Growing(8, ready=3)
    worker = Worker(engine)
    assert worker.report() == StepReport(num_slots=8, ready_slots=3)
    assert worker.report() == StepReport(ready_slots=3)
    pool.num_ready_slots = 5
    assert worker.report() == StepReport(ready_slots=5)
    pool.num_ready_slots = 8
    assert worker.report() == StepReport(ready_slots=8)
    assert worker.report() == StepReport()


def test_a_pool_that_stops_growing_tells_its_size_again(engine: CommandedCopyEngine) -> None:
    engine.pool = pool = Growing(8, ready=3)
    worker = Worker(engine)
    worker.report()
    pool.num_slots = pool.num_ready_slots = 6
    assert worker.report() == StepReport(num_slots=6, ready_slots=6)
    assert worker.report() == StepReport()


@pytest.mark.parametrize("direction", list(Direction))
def test_slot_that_this_rank_lacks(engine: CommandedCopyEngine, direction: Direction) -> None:
    worker = running(engine)
    jobs = (job(1, (0, 7)), job(2, (1, 8)))
    loads = jobs if direction is Direction.LOAD else ()
    stores = jobs if direction is Direction.STORE else ()
    worker.begin(StepPlan(loads, stores, has_forward=False))
    assert engine.tickets == []
    assert worker.report().failed == {1, 2}
    worker.begin(StepPlan((job(3, (0, 7)),)))  # the last one that there is
    assert len(engine.tickets) == 1


def test_only_the_first_failure_is_logged(
    engine: CommandedCopyEngine, caplog: pytest.LogCaptureFixture
) -> None:
    worker = running(engine)
    engine.refuse = True
    for number in range(3):
        worker.begin(StepPlan((job(number, (0, 5)),)))
    assert len(caplog.records) == 1
    assert "refused on command" in caplog.text


def test_close_lets_copies_end_and_report_tells(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    worker.begin(StepPlan(stores=(job(1, (0, 5)),), has_forward=False))
    worker.close()
    assert engine.closed
    assert engine.pool.bytes[5, 0] == 1
    assert worker.report() == StepReport(finished(1))


def plan_of(*loads: Job) -> StepPlan:
    return StepPlan(loads, by_layer=True)


def proven(layers: str) -> tuple[CommandedCopyEngine, Worker]:
    """A worker that saw every layer of a forward come by."""
    engine = commanded(layers=layers)
    worker = running(engine)
    worker.begin(StepPlan(), layers)
    for name in layers:
        worker.pass_layer(name)
    worker.store()
    return engine, worker


def test_each_layer_waits_for_its_own_part() -> None:
    engine, worker = proven("abc")
    worker.begin(plan_of(job(1, (0, 5))), "abc")
    assert engine.fenced == []
    for count, name in enumerate("abc", 1):
        worker.pass_layer(name)
        assert engine.fenced == engine.tickets[:count]
    worker.store()
    assert worker.report() == StepReport(layered_loads=1)
    for ticket in engine.tickets:
        ticket.finish()
    assert worker.report() == StepReport(finished(1))


@pytest.mark.parametrize("hooked", ["", "ab"], ids=["graph", "one layer without"])
def test_all_is_waited_for_where_a_layer_will_not_come_by(hooked: str) -> None:
    engine, worker = proven("abc")
    worker.begin(plan_of(job(1, (0, 5))), hooked)
    assert engine.fenced == engine.tickets
    assert len(engine.tickets) == 1


def test_all_is_waited_for_before_layers_were_seen_to_come_by() -> None:
    engine = commanded(layers="ab")
    worker = running(engine)
    worker.begin(plan_of(job(1, (0, 5))), "ab")
    assert engine.fenced == engine.tickets
    worker.pass_layer("a")  # and "b" never does
    worker.store()
    worker.begin(plan_of(job(2, (0, 5))), "ab")
    assert engine.fenced == engine.tickets


def test_a_layer_that_did_not_come_by_is_told_and_ends_the_trust() -> None:
    engine, worker = proven("abc")
    worker.begin(StepPlan((job(1, (0, 5)),), (job(2, (3, 6)),), by_layer=True), "abc")
    worker.pass_layer("a")
    worker.store()  # of a forward that may have read too early: nothing of it is kept
    assert engine.directions == [Direction.LOAD] * 3
    report = worker.report()
    assert report == StepReport(finished(2), frozenset({2}), layered_loads=1, unwaited_layers=2)
    bad = worker.take_bad_blocks()
    for ticket in engine.tickets:
        ticket.finish()
    assert bad == {0}
    worker.begin(plan_of(job(3, (0, 5))), "abc")
    assert engine.fenced[-1] is engine.tickets[-1]
    assert len(engine.tickets) == 4


def test_a_load_of_a_request_is_not_waited_for(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    one, other = (replace(job(n, (n, 5)), request_id=f"r{n}") for n in (1, 2))
    worker.begin(StepPlan((one, other), (job(3, (3, 6)),)))
    assert engine.fenced == []
    worker.store()
    assert worker.take_arrived() == set()
    engine.tickets[1].finish()
    assert worker.take_arrived() == {"r2"}
    engine.tickets[0].fail()
    assert worker.take_arrived() == {"r1"}
    assert worker.take_failed_requests() == {"r1"}
    assert worker.take_bad_blocks() == {1}
    engine.tickets[2].finish()
    assert worker.report() == StepReport(finished(1, 2, 3), frozenset({1}))
    assert worker.take_arrived() == worker.take_failed_requests() == set()


def test_a_failing_load_of_a_request_spoils_no_store(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    load = replace(job(1, (1, 99)), request_id="r")  # a slot that there is not
    worker.begin(StepPlan((load,), (job(2, (3, 6)),)))
    worker.store()
    assert engine.directions == [Direction.STORE]
    assert worker.take_arrived() == worker.take_failed_requests() == {"r"}


def test_a_load_of_a_request_without_blocks_arrives(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    nothing = np.array([], np.int64)
    worker.begin(StepPlan((Job(1, nothing, nothing, "r"),)))
    assert worker.take_arrived() == {"r"}
    assert worker.report() == StepReport(finished(1))


def test_what_ended_before_it_slept_is_told_when_it_wakes(engine: CommandedCopyEngine) -> None:
    worker = running(engine)
    worker.begin(StepPlan((replace(job(1, (1, 5)), request_id="r"),), (job(2, (3, 6)),)))
    worker.store()
    worker.close()
    woken = commanded()
    worker.reopen(woken)
    assert worker.take_arrived() == {"r"}
    assert worker.report() == StepReport(finished(1, 2))
    worker.begin(StepPlan((job(3, (0, 5)),)))
    assert woken.fenced == woken.tickets
    assert len(engine.tickets) == 2


def test_stores_of_a_forward_whose_end_nobody_told_start_with_the_next_step(
    engine: CommandedCopyEngine,
) -> None:
    worker = running(engine)
    worker.begin(StepPlan(stores=(job(1, (0, 5)),)))
    worker.begin(StepPlan(stores=(job(2, (1, 6)),)))
    assert engine.directions == [Direction.STORE]
    worker.store()
    assert engine.directions == [Direction.STORE] * 2
