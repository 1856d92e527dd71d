"""Worker: carries out StepPlans on one rank and reports what finished, on the model's thread."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvortex.copy_engine import CpuCopyEngine
from kvortex.core import Direction, Job, StepPlan, StepReport, TransferError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvortex.copy_engine import CopyEngine, Ticket
    from kvortex.host_pool import HostPool
    from kvortex.layout import Layout

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Launch:
    """Jobs that one copy carries."""

    direction: Direction
    jobs: Sequence[Job]
    ticket: Ticket


class Worker:
    """Per step: `begin` before the model runs, `store` after it was launched, `report` at the end.

    Never waits for the GPU and never raises for a copy that failed: that is data in the report.
    """

    def __init__(self, copy_engine: CopyEngine) -> None:
        self._copy_engine = copy_engine
        self._stores: tuple[Job, ...] = ()
        self._launches: list[_Launch] = []
        self._finished: dict[int, int] = {}
        self._failed: set[int] = set()
        self._bad_blocks: set[int] = set()
        self._logged = False
        self._slots_to_tell: int | None = copy_engine.pool.num_slots

    def begin(self, plan: StepPlan) -> None:
        """Start the loads; what the current stream does next waits for them."""
        self._bad_blocks.update(plan.lost_block_ids)
        launch = self._launch(Direction.LOAD, plan.loads)
        if launch is not None:
            self._copy_engine.fence(launch.ticket)
        if self._bad_blocks:  # the model computes from wrong bytes: keep nothing of this step
            self._fail(Direction.STORE, plan.stores)
        else:
            self._stores = plan.stores
        if not plan.has_forward:
            self.store()

    def store(self) -> None:
        """Start this step's stores, behind all that the current stream was given so far."""
        self._launch(Direction.STORE, self._stores)
        self._stores = ()

    def report(self) -> StepReport:
        """What ended since the last report."""
        self._launches = [launch for launch in self._launches if not self._ended(launch)]
        report = StepReport(self._finished, frozenset(self._failed), self._slots_to_tell)
        self._finished, self._failed, self._slots_to_tell = {}, set(), None
        return report

    def take_bad_blocks(self) -> set[int]:
        """GPU blocks whose load failed since the last call."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def tickets(self) -> dict[int, Ticket]:
        """The copy that carries each unfinished job."""
        return {job.id: launch.ticket for launch in self._launches for job in launch.jobs}

    def close(self) -> None:
        """Let copies end, so that `report` tells of all; nothing can be launched afterwards."""
        self._copy_engine.close()

    def _launch(self, direction: Direction, jobs: Sequence[Job]) -> _Launch | None:
        """Carry all jobs with one copy."""
        if not jobs:
            return None
        try:
            self._check_slots(jobs)
            ids = np.concatenate([job.block_ids for job in jobs])
            slots = np.concatenate([job.slots for job in jobs])
            launch = _Launch(direction, jobs, self._copy_engine.copy(direction, ids, slots))
        except TransferError as error:
            self._log_once(error)
            self._fail(direction, jobs)
            return None
        self._launches.append(launch)
        return launch

    def _check_slots(self, jobs: Sequence[Job]) -> None:
        """Until the scheduler heard of this pool's size it may plan for slots past its end."""
        num_slots = self._copy_engine.pool.num_slots
        last = max(int(job.slots.max()) for job in jobs)
        if last >= num_slots:
            raise TransferError(f"slot {last} does not exist on this rank ({num_slots} slots)")

    def _ended(self, launch: _Launch) -> bool:
        try:
            if not launch.ticket.done:
                return False
        except TransferError as error:
            self._log_once(error)
            self._fail(launch.direction, launch.jobs)
            return True
        self._finished.update((job.id, 1) for job in launch.jobs)
        return True

    def _fail(self, direction: Direction, jobs: Sequence[Job]) -> None:
        self._finished.update((job.id, 1) for job in jobs)
        self._failed.update(job.id for job in jobs)
        if direction is Direction.LOAD:
            self._bad_blocks.update(*(job.block_ids.tolist() for job in jobs))

    def _log_once(self, error: TransferError) -> None:
        if not self._logged:
            self._logged = True
            logger.error("%s. The engine goes on; later failures are only counted.", error)


def open_worker(layout: Layout, pool: HostPool, num_streams: int) -> Worker:
    """A worker that copies on the device of the KV tensors; the pool is closed if it cannot.

    Raises:
        TransferError: this GPU cannot run the kernel.
    """
    try:
        return Worker(open_copy_engine(layout, pool, num_streams))
    except BaseException:
        pool.close()
        raise


def open_copy_engine(layout: Layout, pool: HostPool, num_streams: int) -> CopyEngine:
    """The engine for the device of the KV tensors."""
    if layout.device.type != "cuda":
        return CpuCopyEngine(layout, pool)
    from kvortex.cuda_copy_engine import CudaCopyEngine  # needs triton, which a CPU may lack

    return CudaCopyEngine(layout, pool, num_streams)
