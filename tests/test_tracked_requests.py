"""TrackedRequests: which blocks and tokens the requests have after each step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

if TYPE_CHECKING:
    from kvortex.connector.tracked_requests import TrackedRequests


@pytest.fixture
def requests() -> TrackedRequests:
    from kvortex.connector.tracked_requests import TrackedRequests

    return TrackedRequests(2)


def request(name: str) -> Any:
    return SimpleNamespace(request_id=name, kv_transfer_params=None)


def step(
    new: dict[str, tuple[int, list[list[int]]]],
    cached: dict[str, tuple[int, list[list[int]] | None]],
    resumed: set[str] = frozenset(),  # type: ignore[assignment]
) -> Any:
    """Of ten tokens of each request: the tokens computed before, and blocks."""
    return SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys((*new, *cached), 10),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, num_computed_tokens=before, block_ids=ids)
            for name, (before, ids) in new.items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached),
            num_computed_tokens=[before for before, _ in cached.values()],
            new_block_ids=[ids for _, ids in cached.values()],
            resumed_req_ids=resumed,
        ),
    )


def test_a_request_is_tracked_from_when_it_is_asked_about(requests: TrackedRequests) -> None:
    asked = request("a")
    tracked = requests.of(asked)
    assert tracked.request is asked
    assert requests.of(asked) is requests["a"] is tracked


def test_a_step_takes_requests_further(requests: TrackedRequests) -> None:
    a, b = requests.of(request("a")), requests.of(request("b"))
    (row,) = requests.advance(step({"a": (32, [[1, 2], [0, 3]])}, {}))
    assert row == (a, [[1, 2], [0, 3]], 32, 42)
    rows = requests.advance(step({"b": (0, [[7], [8]])}, {"a": (42, [[4], [5]])}))
    assert rows == [(b, [[7], [8]], 0, 10), (a, [[1, 2, 4], [0, 3, 5]], 42, 52)]
    rows = requests.advance(step({}, {"a": (52, None)}))
    assert rows == [(a, [[1, 2, 4], [0, 3, 5]], 52, 62)]
    assert (a.computed, b.computed) == (62, 10)


def test_who_is_resumed_has_other_blocks_than_in_the_steps_under_way(
    requests: TrackedRequests,
) -> None:
    requests.of(request("a"))
    (before,) = requests.advance(step({"a": (0, [[1], [2]])}, {}))
    (after,) = requests.advance(step({}, {"a": (0, [[3], [4]])}, resumed={"a"}))
    assert (before[1], after[1]) == ([[1], [2]], [[3], [4]])


def test_what_vllm_keeps_for_its_runner_is_not_ours_to_change(requests: TrackedRequests) -> None:
    requests.of(request("a"))
    theirs = [[1], [2]]
    requests.advance(step({"a": (0, theirs)}, {}))
    requests.advance(step({}, {"a": (10, [[3], [4]])}))
    assert theirs == [[1], [2]]


def test_others_are_left_alone(requests: TrackedRequests) -> None:
    """Such as were finished while they were in a step that vLLM had planned."""
    assert requests.advance(step({"a": (0, [[1], [2]])}, {"b": (0, None)})) == []
    assert requests == {}


def test_keys_follow_tokens_that_are_replaced(requests: TrackedRequests) -> None:
    """As vLLM does where a session goes on: it cuts hashes and appends others."""
    asked = request("a")
    asked.block_hashes = [b"1" * 32, b"2" * 32, b"3" * 32]
    tracked = requests.of(asked)
    before = tracked.keys(0, 0, 3)
    assert [key[:32] for key in before] == asked.block_hashes
    del asked.block_hashes[2:]
    assert tracked.keys(0, 0, 3) == before[:2]
    asked.block_hashes += [b"4" * 32, b"5" * 32]
    assert [key[:32] for key in tracked.keys(0, 0, 9)] == asked.block_hashes
    asked.block_hashes[1:] = [b"6" * 32, b"7" * 32, b"8" * 32]
    assert [key[:32] for key in tracked.keys(0, 0, 9)] == asked.block_hashes
