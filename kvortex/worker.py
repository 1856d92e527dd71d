"""Worker: carries out StepPlans on one rank and reports what finished, on the model's thread."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from functools import partial, wraps
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from kvortex.bad_blocks import BadBlocks
from kvortex.copy_engine import CpuCopyEngine
from kvortex.core import Direction, Job, StepPlan, StepReport, TransferError
from kvortex.layer_gate import LayerGate

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence, Set

    from kvortex.copy_engine import CopyEngine, Ticket
    from kvortex.core import BlockIds
    from kvortex.disk_worker import DiskWorker
    from kvortex.host_pool import HostPool
    from kvortex.layout import Layout
    from kvortex.verification import Verification

logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound="Callable[..., object]")


@dataclass(slots=True, eq=False)
class _Launch:
    """Jobs that one copy carries."""

    direction: Direction
    jobs: Sequence[Job]
    ticket: Ticket
    told: set[int] | None = None
    """Where its bad blocks are noted, if that is not the next to be taken."""

    @property
    def is_awaited(self) -> bool:
        """Whether some forward waits for what it loads."""
        of_forward = any(job.request_id is None for job in self.jobs)
        return of_forward and self.direction is Direction.LOAD


def _locked(method: Method) -> Method:
    """Let one thread in at a time."""

    @wraps(method)
    def alone(self: Worker, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with self._lock:
            return method(self, *args, **kwargs)

    return cast("Method", alone)


class Worker:
    """Per step: `begin` before the model runs, `pass_layer` as each of its layers does, `store`
    after it was launched, `report` at the end.

    Never waits for the GPU, and never raises for a copy that failed: that is data in the report.
    One thread; what `take_bad_blocks` returns may be looked into in another.
    """

    def __init__(self, copy_engine: CopyEngine, disk: DiskWorker | None = None) -> None:
        self._copy_engine = copy_engine
        self._disk = disk
        self._lock = RLock()
        self._gate = LayerGate(copy_engine.layout.pages_of, copy_engine.fence)
        self._stores: tuple[Job, ...] = ()
        self._launches: list[_Launch] = []
        self._finished: dict[int, int] = {}
        self._failed: set[int] = set()
        self._corrupt: dict[int, frozenset[int]] = {}
        self._corrupt_layers: str | None = None
        self._bad_blocks: set[int] = set()
        self._misled = False
        self._forward_open = False
        self._layered_blocks: set[int] = set()
        self._arrived: set[str] = set()
        self._failed_requests: set[str] = set()
        self._lost_requests: set[str] = set()
        self._layered_loads = 0
        self._step: int | None = None
        self._unwaited_layers = 0
        self._logged = False
        self._told_slots: int | None = None
        self._pool_grows = copy_engine.pool.num_ready_slots < copy_engine.pool.num_slots

    @_locked
    def begin(self, plan: StepPlan, hooked_layers: Collection[str] = ()) -> None:
        """Start the loads; the current stream waits for those that belong to no `request_id`.

        Args:
            plan: of this step.
            hooked_layers: those that will tell `pass_layer` when they run in this step. Where they
                cannot be relied on, all that the current stream does next waits for the loads.
        """
        if self._forward_open:  # nobody said that the last one ended: vLLM's pipeline with drafts
            self.store()
        self._forward_open = True
        self._step = plan.step
        if plan.disk is not None and self._disk is not None:
            self._disk.begin(plan.disk)
        self._bad_blocks.update(plan.lost_block_ids)
        self._misled = self._misled or bool(plan.lost_block_ids)
        self._lost_requests.update(plan.lost_requests)
        awaited = [job for job in plan.loads if job.request_id is None]
        by_layer = plan.by_layer and self._gate.trusts(hooked_layers)
        self._load_awaited(awaited, by_layer=by_layer)
        for job in plan.loads:
            if job.request_id is not None:
                self._launch(Direction.LOAD, [job])
        if self._misled:  # this forward computes from wrong bytes: keep nothing of this step
            self._fail(Direction.STORE, plan.stores)
        else:
            self._stores = plan.stores
        if not plan.has_forward:
            self.store()

    def pass_layer(self, name: str) -> None:
        """A layer runs next on the current stream, which waits for this layer's loads."""
        self._gate.pass_through(name)

    @_locked
    def store(self) -> None:
        """Start this step's stores, behind all that the current stream was given so far."""
        self._forward_open = False
        missed = self._gate.end_forward()
        if missed:
            self._bad_blocks |= self._layered_blocks
            self._unwaited_layers += missed
            self._fail(Direction.STORE, self._stores)
            self._stores = ()
            logger.error("%d layers ran before their KV had arrived; from now on all wait.", missed)
        self._launch(Direction.STORE, self._stores)
        self._stores = ()

    @_locked
    def report(self) -> StepReport:
        """What ended since the last report."""
        self._poll()
        num_slots, ready_slots = self._news_of_pool()
        report = StepReport(
            self._finished,
            frozenset(self._failed),
            num_slots,
            self._copy_engine.bytes_per_s(Direction.LOAD),
            self._copy_engine.bytes_per_s(Direction.STORE),
            self._layered_loads,
            self._step,
            self._unwaited_layers,
            ready_slots,
            self._disk.report() if self._disk is not None else None,
            self._corrupt,
            self._corrupt_layers or "",
        )
        self._finished, self._failed, self._corrupt = {}, set(), {}
        if self._corrupt_layers is not None:
            self._corrupt_layers = ""  # told
        self._layered_loads = self._unwaited_layers = 0
        self._step = None
        return report

    @_locked
    def take_arrived(self) -> set[str]:
        """Requests whose load ended since the last call, well or not."""
        self._poll()
        arrived, self._arrived = self._arrived, set()
        return arrived

    @_locked
    def take_failed_requests(self) -> set[str]:
        """Those of them whose load failed."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    @_locked
    def take_bad_blocks(self) -> Set[int]:
        """GPU blocks whose load failed since the last call.

        What the loads brought for which this step's forward waits may turn out to be corrupt, and
        is to be known before an output that used it leaves the engine: who looks waits for them.
        """
        self._poll()
        bad, self._bad_blocks = self._bad_blocks, set()
        self._misled = False
        awaited = [one for one in self._launches if one.is_awaited and one.told is None]
        for launch in awaited:
            launch.told = bad
        return BadBlocks(bad, partial(self._await, awaited)) if awaited else bad

    @_locked
    def _await(self, launches: Sequence[_Launch]) -> None:
        for launch in launches:
            with contextlib.suppress(TransferError):  # the poll notes it
                launch.ticket.wait()
        self._poll()

    def tickets(self) -> dict[int, Ticket]:
        """The copy that carries each unfinished job."""
        return {job.id: launch.ticket for launch in self._launches for job in launch.jobs}

    @_locked
    def close(self) -> None:
        """Let copies end, so that `report` tells of all; nothing can be launched until `reopen`."""
        self._copy_engine.close()
        self._poll()

    def reopen(self, copy_engine: CopyEngine) -> None:
        """Go on after `close`, over KV tensors of the same layout and the same pool."""
        self._copy_engine = copy_engine
        self._gate = LayerGate(copy_engine.layout.pages_of, copy_engine.fence)

    def _load_awaited(self, jobs: Sequence[Job], *, by_layer: bool) -> None:
        """Start loads that this step's forward needs."""
        tickets = self._launch(Direction.LOAD, jobs, by_layer=by_layer)
        if by_layer and tickets:
            self._gate.close(tickets)
            self._layered_blocks = {i for job in jobs for i in job.block_ids.tolist()}
            self._layered_loads += 1
        else:
            for ticket in tickets:
                self._copy_engine.fence(ticket)

    def _launch(
        self, direction: Direction, jobs: Sequence[Job], *, by_layer: bool = False
    ) -> Sequence[Ticket]:
        """Carry all jobs with one copy, or page by page; the last ticket is that of the whole."""
        if not any(len(job.slots) for job in jobs):
            self._end(jobs)
            return ()
        if not self._has_slots(jobs):
            self._fail(direction, jobs)
            return ()
        try:
            ids = np.concatenate([job.block_ids for job in jobs])
            slots = np.concatenate([job.slots for job in jobs])
            seeds = np.concatenate([_seeds(job) for job in jobs])
            if by_layer:
                tickets = self._copy_engine.load_layers(ids, slots, seeds)
            else:
                tickets = [self._copy_engine.copy(direction, ids, slots, seeds)]
        except TransferError as error:
            self._log_once(error)
            self._fail(direction, jobs)
            return ()
        self._launches.append(_Launch(direction, jobs, tickets[-1]))
        return tickets

    def _news_of_pool(self) -> tuple[int | None, int | None]:
        """Its size if that is new, and while it grows, how many slots are ready."""
        pool = self._copy_engine.pool
        ready = pool.num_ready_slots  # before the size, which becomes final with the last of them
        size = pool.num_slots
        news = size if size != self._told_slots else None, ready if self._pool_grows else None
        self._told_slots, self._pool_grows = size, ready < size
        return news

    def _poll(self) -> None:
        self._launches = [launch for launch in self._launches if not self._ended(launch)]

    def _has_slots(self, jobs: Sequence[Job]) -> bool:
        """Until the scheduler heard how many are ready it may plan for more."""
        last = max(int(job.slots.max()) for job in jobs if len(job.slots))
        return last < self._copy_engine.pool.num_ready_slots

    def _ended(self, launch: _Launch) -> bool:
        try:
            if not launch.ticket.done:
                return False
        except TransferError as error:
            self._log_once(error)
            self._fail(launch.direction, launch.jobs, launch.told)
            return True
        self._end(launch.jobs)
        if launch.ticket.bad_block_ids:
            self._note_corrupt(launch)
        return True

    def _note_corrupt(self, launch: _Launch) -> None:
        """Some of what was loaded is not what was stored: to those who wait it is as if it had
        failed."""
        bad = launch.ticket.bad_block_ids
        for job in launch.jobs:
            found = np.isin(job.block_ids, bad)
            if not found.any():
                continue
            positions = np.flatnonzero(found).tolist()
            self._corrupt[job.id] = frozenset(positions)
            if self._corrupt_layers is None:
                slot, seed = job.slots[positions[0]], _seeds(job)[positions[0]]
                self._corrupt_layers = self._copy_engine.wrong_layers(int(slot), int(seed))
            self._note_bad(job, job.block_ids[found].tolist(), launch.told)
            if job.request_id is not None:
                self._failed_requests.add(job.request_id)

    def _note_bad(self, job: Job, block_ids: list[int], told: set[int] | None = None) -> None:
        """In the set that tells of its step; of a later one the forward may still be to come."""
        if told is not None:
            told.update(block_ids)
            return
        self._bad_blocks.update(block_ids)
        self._misled = self._misled or job.request_id is None

    def _end(self, jobs: Sequence[Job]) -> set[str]:
        """Tell of jobs that ended; returns the requests that wait for them."""
        self._finished.update((job.id, 1) for job in jobs)
        requests = {job.request_id for job in jobs if job.request_id is not None}
        self._arrived |= requests
        self._failed_requests |= requests & self._lost_requests
        self._lost_requests -= requests
        return requests

    def _fail(
        self, direction: Direction, jobs: Sequence[Job], told: set[int] | None = None
    ) -> None:
        self._failed_requests |= self._end(jobs)
        self._failed.update(job.id for job in jobs)
        if direction is Direction.LOAD:
            for job in jobs:
                self._note_bad(job, job.block_ids.tolist(), told)

    def _log_once(self, error: TransferError) -> None:
        if not self._logged:
            self._logged = True
            logger.error("%s. The engine goes on; later failures are only counted.", error)


def _seeds(job: Job) -> BlockIds:
    return job.seeds if job.seeds is not None else np.zeros(len(job.slots), np.int64)


def open_worker(
    layout: Layout,
    pool: HostPool,
    num_streams: int,
    verification: Verification | None = None,
    disk: DiskWorker | None = None,
) -> Worker:
    """A worker that copies on the device of the KV tensors; the pool is closed if it cannot.

    Raises:
        TransferError: this GPU cannot run the kernel.
    """
    try:
        return Worker(open_copy_engine(layout, pool, num_streams, verification), disk)
    except BaseException:
        pool.close()
        raise


def open_copy_engine(
    layout: Layout,
    pool: HostPool,
    num_streams: int,
    verification: Verification | None = None,
    *,
    warm_up: bool = True,
) -> CopyEngine:
    """The engine for the device of the KV tensors; without `warm_up` the pool stays as it is."""
    if layout.device.type != "cuda":
        return CpuCopyEngine(layout, pool, verification)
    from kvortex.cuda_copy_engine import CudaCopyEngine  # needs triton, which a CPU may lack

    return CudaCopyEngine(layout, pool, num_streams, verification, warm_up=warm_up)
