"""StorePlanner: which blocks of which step are stored, and for how long they are held."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvortex.policies import LRU
from kvortex.prefix_match import Reach
from kvortex.scheduler import OffloadScheduler
from kvortex.tiers import HostTier

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

if TYPE_CHECKING:
    from kvortex.connector.tracked_request import TrackedRequest

BLOCK = 16


class Pool:
    """vLLM's, which counts references. Block 0 is the null block."""

    def __init__(self) -> None:
        self.blocks = [SimpleNamespace(block_id=n, is_null=not n, ref_cnt=1) for n in range(16)]

    def touch(self, blocks: Any) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            block.ref_cnt -= 1

    def held(self) -> list[int]:
        return [block.block_id for block in self.blocks if block.ref_cnt > 1]


class World:
    """A planner of one KV cache group."""

    def __init__(self, reach: Reach | None = None, slots: int = 16) -> None:
        from kvortex.connector.geometry import Geometry
        from kvortex.connector.gpu_blocks import GpuBlocks
        from kvortex.connector.store_planner import StorePlanner

        self.offload = OffloadScheduler(HostTier(slots, LRU(slots)))
        self.gpu, self.pool = GpuBlocks(), Pool()
        geometry = Geometry(("a",), (reach or Reach(),), 4096, BLOCK, 1 << 20, 1)
        self.planner = StorePlanner(self.offload, self.gpu, geometry)

    def bound(self) -> World:
        pool: Any = self.pool
        self.gpu.bind(pool)
        return self

    def store(self, *rows: tuple[TrackedRequest, int, int]) -> list[int]:
        """Which blocks are stored of a step."""
        self.planner.store([(one, one.block_ids, before, after) for one, before, after in rows])
        return [block for job in self.offload.take_plan().stores for block in job.block_ids]


def request(number: int, block_ids: list[int]) -> TrackedRequest:
    """Those of equal numbers have equal tokens, and as many as fill their blocks."""
    from kvortex.connector.tracked_request import TrackedRequest

    hashes = [bytes([number]) * 24 + i.to_bytes(8, "big") for i in range(len(block_ids))]
    told: Any = SimpleNamespace(
        block_hashes=hashes, kv_transfer_params=None, num_computed_tokens=0, num_tokens=1
    )
    tracked = TrackedRequest.of(told)
    tracked.block_ids = [block_ids]
    return tracked


def test_each_block_is_stored_once_as_it_fills() -> None:
    world, asked = World().bound(), request(0, [1, 2, 3])
    assert world.store((asked, 0, 15)) == []
    assert world.store((asked, 15, 33)) == [1, 2]
    assert world.store((asked, 33, 34)) == []
    assert world.store((asked, 34, 64)) == [3]


def test_nothing_is_stored_before_vllm_told_its_pool() -> None:
    world, asked = World(), request(0, [1])
    assert world.store((asked, 0, 16)) == []


def test_a_block_that_two_compute_in_one_step_is_stored_once() -> None:
    world = World().bound()
    rows = [(request(0, [1, 2]), 0, 32), (request(0, [3, 4, 5]), 0, 48), (request(1, [6]), 0, 16)]
    assert world.store(*rows) == [3, 4, 5, 6]


def test_the_null_block_is_not_stored() -> None:
    assert World().bound().store((request(0, [0, 0, 3]), 0, 48)) == [3]


def test_behind_a_window_nothing_is_stored() -> None:
    world = World(Reach(window=2 * BLOCK)).bound()
    assert world.store((request(0, [1, 2, 3, 4, 5]), 64, 80)) == [3, 4, 5]


def test_what_was_computed_before_a_reset_is_not_stored() -> None:
    world, asked = World().bound(), request(0, [1])
    asked.stale = True
    assert world.store((asked, 0, 16)) == []


def test_what_is_computed_again_is_considered_again() -> None:
    world, asked = World().bound(), request(0, [1, 2, 3, 4])
    assert world.store((asked, 0, 48)) == [1, 2, 3]
    world.offload.reset()
    for flight in world.offload._flights.values():
        world.offload.tier.abort(flight.blocks)
    asked.request.num_computed_tokens = 20
    world.planner.rewind([asked])
    assert world.store((asked, 20, 48)) == [2, 3]
    asked.request.num_computed_tokens = 64  # of steps under way
    world.planner.rewind([asked])
    assert world.store((asked, 48, 64)) == [4]


def test_sources_are_held_until_every_rank_is_done() -> None:
    world = World(slots=2).bound()
    world.store((request(0, [1, 2, 3]), 0, 48))
    assert world.pool.held() == [1, 2], "there was no slot for the third"
    assert not world.gpu.frees_any
    world.pool.blocks[2].ref_cnt -= 1  # its request is gone
    assert world.gpu.frees_any
    (flight,) = world.offload._flights.values()
    world.planner.ended(flight.job)
    assert [world.pool.blocks[n].ref_cnt for n in (1, 2, 3)] == [1, 0, 1]
    assert not world.gpu.frees_any
