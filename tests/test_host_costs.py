"""What the host pays for each block, by pytest-benchmark; limits lie far above the usual."""

from __future__ import annotations

from collections import deque
from functools import partial
from threading import Event
from typing import TYPE_CHECKING

import pytest
import torch

from kvortex.bell import Bell
from kvortex.core import Direction, StepReport
from kvortex.disk.lane import Lane
from kvortex.disk.slots import Status
from kvortex.plugins import load_policy
from kvortex.scheduler import OffloadScheduler
from kvortex.tiers import HostTier

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SLACK = 20
"""A machine of CI may be slow and busy; what is caught is work that grew, not a slow clock."""


def median(benchmark: BenchmarkFixture) -> float:
    """Seconds."""
    assert benchmark.stats is not None
    return float(benchmark.stats["median"])


def test_lane(benchmark: BenchmarkFixture) -> None:
    """What the thread that owns a lane pays for a row of 64, while the lane works on others."""
    closing = Event()
    lane = Lane("busy", 1, lambda row: Status.DONE, deque(maxlen=1), Bell(), closing)
    rows = [(1, position, 0, 1, 0.0) for position in range(64)]

    def through() -> None:
        lane.under_way = 0
        assert lane.push(rows) == 64

    benchmark(through)
    closing.set()
    lane.wake()
    assert lane.join(20)
    assert median(benchmark) / 64 < 0.2e-6 * SLACK


@pytest.mark.parametrize("policy", ["lru", "lfu", "lru_freq"])
def test_storing_into_a_full_pool(benchmark: BenchmarkFixture, policy: str) -> None:
    """Reserve, evict, plan, settle and commit, per block of a step that stores 64."""
    keeper = OffloadScheduler(HostTier(4096, load_policy(policy, 4096)))
    number = 0

    def step() -> None:
        nonlocal number
        keys = [(number + i).to_bytes(32, "big") for i in range(64)]
        number += 64
        job = keeper.store(keys, range(64))
        assert job is not None
        keeper.take_plan()
        keeper.settle(StepReport({job.id: 1}))

    for _ in range(4096 // 64):
        step()
    benchmark(step)
    assert median(benchmark) / 64 < 10e-6 * SLACK


@pytest.mark.gpu
@NO_CUDA
@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("blocks", [1, 2048])
def test_submission(benchmark: BenchmarkFixture, direction: Direction, blocks: int) -> None:
    from kvortex.cuda_copy_engine import CudaCopyEngine
    from kvortex.tune import rig
    from kvortex.verification import verification_of

    with rig(torch.device("cuda", 0), 4096, 4096 * 32 * 2048) as machine:
        engine = CudaCopyEngine(
            machine.layout, machine.pool, 4, verification_of(machine.layout, "always")
        )
        ids, slots = machine.block_ids[:blocks], machine.slots[:blocks]
        benchmark.pedantic(  # type: ignore[no-untyped-call]
            partial(engine.copy, direction, ids, slots),
            setup=torch.cuda.synchronize,
            rounds=100,
            warmup_rounds=3,
        )
        engine.close()
    assert median(benchmark) < (7.3e-6 if blocks == 1 else 204.8e-6) * 5
