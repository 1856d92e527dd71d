"""What is found to be wrong when a load has failed: with blocks of four tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

if TYPE_CHECKING:
    from kvortex.connector.steps_under_way import StepsUnderWay
    from kvortex.connector.tracked_request import TrackedRequest


class Told:
    """A vLLM request, as far as it is looked at."""

    kv_transfer_params = None


def requests(number: int) -> list[TrackedRequest]:
    from kvortex.connector.tracked_request import TrackedRequest

    told: Any = Told()
    return [TrackedRequest.of(told) for _ in range(number)]


@pytest.fixture
def steps() -> StepsUnderWay:
    from kvortex.connector.steps_under_way import StepsUnderWay

    return StepsUnderWay(4)


def test_what_is_computed_from_a_bad_block_is_bad_also_for_who_shares_it(
    steps: StepsUnderWay,
) -> None:
    first, sharing, other = requests(3)
    rows = [
        (sharing, [[1, 2, 4]], 8, 10),  # reads what the next one computes in the same step
        (first, [[1, 2, 3]], 4, 9),
        (other, [[7, 8]], 5, 6),
    ]
    steps.begin(0, rows, waits=True)
    assert steps.spoilt_by({1}) == {1, 2, 3, 4}
    assert steps.spoilt_by({4}) == set(), "nobody read it, and its owner wrote it"
    assert steps.spoilt_by({9}) == {9}


@pytest.mark.parametrize(("first", "spoilt"), [(4, set()), (5, {2, 3}), (8, {2, 3})])
def test_a_block_that_is_continued_is_read(
    steps: StepsUnderWay, first: int, spoilt: set[int]
) -> None:
    (request,) = requests(1)
    steps.begin(0, [(request, [[1, 2, 3]], first, 10)], waits=True)
    assert steps.spoilt_by({2}) == spoilt


def test_a_later_step_goes_on_from_what_was_spoilt_or_writes_over_it(steps: StepsUnderWay) -> None:
    misled, late, other = requests(3)
    steps.begin(0, [(misled, [[1, 2]], 4, 5)], waits=True)
    steps.begin(1, [(late, [[1, 2, 3]], 8, 9), (other, [[4]], 0, 2)], waits=False)
    steps.begin(2, [(other, [[2]], 0, 4)], waits=False)
    assert steps.spoilt_by({1, 4}) == {1, 3}


def test_steps_end_in_order(steps: StepsUnderWay) -> None:
    before, after = requests(2)
    steps.begin(5, [(before, [[1, 2]], 4, 5)], waits=True)
    assert steps.wait_for_loads
    steps.begin(7, [(after, [[1, 3]], 4, 5)], waits=False)
    assert steps.spoilt_by({1}) == {1, 2, 3}
    steps.drop_before(7)
    assert not steps.wait_for_loads
    assert steps.spoilt_by({1}) == {1, 3}
    steps.drop_before(8)
    assert steps.spoilt_by({1}) == {1}
