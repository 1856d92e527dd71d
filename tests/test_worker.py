"""Worker: carries out plans, never raises for a copy, keeps nothing of a step that went wrong."""

from __future__ import annotations

import numpy as np
import pytest
from doubles import CommandedCopyEngine, commanded

from kvortex.core import Direction, Job, StepPlan, StepReport
from kvortex.worker import Worker


@pytest.fixture
def engine() -> CommandedCopyEngine:
    engine = commanded()
    page = engine.layout.pages[0].view
    for number in range(len(page)):
        page[number] = number + 1
        engine.pool.bytes[number] = 100 + number
    return engine


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
