"""Setbacks: who goes back when a load has failed, and who is told: with blocks of four tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvortex.connector.setbacks import Setbacks
    from kvortex.connector.tracked_request import TrackedRequest

BLOCK = 4


class World:
    """Requests, their blocks, and a runner that notes who is handed over to it."""

    def __init__(self, *, has_runner: bool = True) -> None:
        from kvortex.connector.gpu_blocks import GpuBlocks
        from kvortex.connector.setbacks import Setbacks
        from kvortex.connector.tracked_requests import TrackedRequests

        gpu, pool, runner = GpuBlocks(), SimpleNamespace(), SimpleNamespace()
        self.evicted: list[set[int]] = []
        self.told: list[list[str]] = []
        pool.evict_blocks = self.evicted.append
        runner.hand_over = lambda _, again: self.told.append(
            [tracked.request.request_id for tracked in again]
        )
        gpu.bind(pool)
        self.requests = TrackedRequests(1)
        hears: Any = runner if has_runner else None
        self.setbacks: Setbacks = Setbacks(self.requests, gpu, BLOCK, hears)

    def add(self, name: str, block_ids: list[int], computed: int) -> TrackedRequest:
        request: Any = SimpleNamespace(
            request_id=name,
            kv_transfer_params=None,
            num_computed_tokens=computed,
            num_in_flight_tokens=1,
            num_stale_output_tokens=0,
            num_output_placeholders=1,
            spec_token_ids=[5],
        )
        tracked = self.requests.of(request)
        tracked.block_ids = [block_ids]
        return tracked

    def begin(self, step: int, tracked: TrackedRequest, first: int, *, waits: bool = True) -> None:
        """A step computes one token of one request."""
        rows = [(tracked, tracked.block_ids, first, first + 1)]
        self.setbacks.begin(step, rows, waits=waits)

    def mend(self, scheduled: Sequence[str] = (), preempted: Sequence[str] = ()) -> None:
        output: Any = SimpleNamespace(
            num_scheduled_tokens=dict.fromkeys(scheduled, 1), preempted_req_ids=set(preempted)
        )
        self.setbacks.mend(output)

    def computed(self) -> list[int]:
        return [tracked.request.num_computed_tokens for tracked in self.requests.values()]


def outputs_to_come(tracked: TrackedRequest) -> int:
    """What vLLM will take of the steps under way."""
    return int(tracked.request.num_output_placeholders)


def test_all_who_share_what_was_computed_from_a_bad_block_go_back() -> None:
    world = World()
    misled = world.add("misled", [1, 2, 3], 9)
    world.add("shares", [1, 2, 4], 10)
    world.add("reads the last", [7, 3, 5], 10)
    world.add("other", [7, 8], 5)
    world.begin(0, misled, 8)
    world.setbacks.settle(0, {2})
    assert world.evicted == [{2, 3}]
    assert world.computed() == [4, 4, 4, 5]
    assert [outputs_to_come(tracked) for tracked in world.requests.values()] == [0, 0, 0, 1]


def test_nobody_is_sent_forward() -> None:
    world = World()
    world.add("early", [1, 2, 3], 2)
    world.setbacks.settle(None, {2})
    assert world.computed() == [2]


def test_a_load_spoils_what_its_own_step_and_later_ones_compute() -> None:
    world = World()
    before, now, later = (world.add(name, [1, n], 5) for n, name in ((2, "b"), (3, "n"), (4, "l")))
    for step, tracked in enumerate((before, now, later)):
        world.begin(step, tracked, 4)
    world.setbacks.settle(1, {1})  # vLLM does not pass on every report
    world.setbacks.settle(None, {1})
    assert world.evicted == [{1, 3, 4}, {1, 4}]


def test_a_good_report_sends_nobody_back() -> None:
    world = World()
    world.begin(0, world.add("fine", [1, 2], 5), 4)
    world.setbacks.settle(0, set())
    world.mend(["fine"])
    assert (world.evicted, world.computed(), world.told) == ([], [5], [])


def test_a_runner_is_told_until_they_run() -> None:
    world = World()
    for name in ("waits", "runs", "gone"):
        world.add(name, [1], 4)
    world.setbacks.settle(None, {1})
    del world.requests["gone"]
    for scheduled in (["runs"], [], ["waits"], ["waits", "runs"]):
        world.mend(scheduled)
    assert world.told == [["waits", "runs"], ["waits"], ["waits"]]
    world.setbacks.settle(None, {1})
    world.mend(["runs"])
    assert world.told[3:] == [["waits", "runs"]]


def test_where_the_runner_sees_for_itself_all_go_back_as_well() -> None:
    world = World(has_runner=False)
    world.add("alone", [1], 4)
    world.setbacks.settle(None, {1})
    world.mend(["alone"])
    assert world.computed() == [0]


@pytest.mark.parametrize("waits", [True, False])
def test_who_is_preempted_while_a_load_may_fail_begins_anew(waits: bool) -> None:
    """What it sampled from the load is not looked at again, unlike what its blocks hold."""
    world = World()
    runs, other = world.add("runs", [1, 2], 5), world.add("other", [3, 4], 5)
    world.begin(0, runs, 4, waits=waits)
    world.mend(preempted=["runs", "not ours"])
    assert (outputs_to_come(runs), outputs_to_come(other)) == (0 if waits else 1, 1)
    world.setbacks.settle(0, set())
    world.mend(preempted=["other"])
    assert outputs_to_come(other) == 1, "the load has ended well"
