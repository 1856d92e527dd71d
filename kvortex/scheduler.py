"""OffloadScheduler: matches prefixes, writes each StepPlan and settles each StepReport.

Runs in vLLM's scheduler process, on its thread; imports neither torch nor triton.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvortex.absences import Absences
from kvortex.core import Direction, Job, StepPlan, StepReport
from kvortex.metrics import Counters, MissReason
from kvortex.overflow import Overflow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvortex.block import Block
    from kvortex.core import BlockKey
    from kvortex.policies import Place
    from kvortex.tiers import HostTier

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Flight:
    """A job that workers have not finished yet, and the blocks it holds in the tier."""

    job: Job
    direction: Direction
    blocks: list[Block]
    ranks_left: int
    planned_at: float
    bad: set[int] = field(default_factory=set)
    """Positions of blocks that did not arrive as they should, on some rank."""
    corrupt: set[int] = field(default_factory=set)
    """Those of them whose bytes are not what was stored."""
    discard: bool = False
    """A store whose source may hold wrong bytes, or which was made before a reset."""

    @property
    def failed(self) -> bool:
        """Whether any of it did not arrive."""
        return bool(self.bad)


class OffloadScheduler:
    """Decides what moves. Bytes are readable only after every rank reported its store."""

    def __init__(
        self,
        tier: HostTier,
        num_ranks: int = 1,
        slot_bytes: int = 0,
        disk: HostTier | None = None,
        disk_write_bytes_per_s: float | None = None,
    ) -> None:
        """`disk` is the tier of the workers' disks, if they have any; None is no limit of speed."""
        self.tier = tier
        self._planned_slots = tier.index.num_slots
        self._block_bytes = slot_bytes * num_ranks
        self.counters = Counters()
        self.overflow: Overflow | None = None
        self._absences = Absences(tier.index.num_slots + (disk.index.num_slots if disk else 0))
        tier.on_evict.append(self._note_evicted)
        if disk is not None:
            self.overflow = Overflow(
                tier, disk, self.counters, num_ranks, self._block_bytes, disk_write_bytes_per_s
            )
            self.overflow.fetches.on_bad_read = self._note_failed
            disk.on_evict.append(self._note_evicted)
        self._num_ranks = num_ranks
        self._flights: dict[int, Flight] = {}
        self._new: dict[Direction, list[Job]] = {Direction.STORE: [], Direction.LOAD: []}
        self._lost: list[int] = []
        self._lost_requests: list[str] = []
        self._next_job_id = 0
        self._logged: set[str] = set()
        self._corrupt_layers = ""

    @property
    def pending(self) -> bool:
        """Whether a job is planned or under way."""
        return self.num_pending > 0 or (self.overflow is not None and self.overflow.pending)

    @property
    def num_pending(self) -> int:
        """Jobs planned or under way."""
        on_disk = self.overflow.num_pending if self.overflow is not None else 0
        return len(self._flights) + on_disk

    def wants(self, key: BlockKey) -> bool:
        """Whether a store of the key would add anything: it is neither readable nor arriving."""
        return self.tier.lookup(key) is None and not self.tier.is_arriving(key)

    def admits(self, key: BlockKey, place: Place) -> bool:
        """Whether a block that it `wants` is worth a slot; to be asked once for each request."""
        admitted = self.tier.admits(key, place)
        if not admitted:
            self.counters.not_admitted += 1
            self._absences.note(key, MissReason.NOT_ADMITTED)
        elif self.overflow is not None:
            self.overflow.write_behind.consider(key, place)
        return admitted

    def why_missing(self, key: BlockKey) -> MissReason:
        """Of a key that the host cannot serve."""
        reason = self._absences.why(key)
        if reason is not MissReason.FAILED and self.overflow is not None:
            not_fetched = self.overflow.why_not_fetched(key)
            if not_fetched is not None:
                return not_fetched
        return MissReason.IN_FLIGHT if self.tier.is_arriving(key) else reason

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Count a use of the blocks of a request, wherever they are."""
        self.tier.touch(keys)
        if self.overflow is not None:
            self.overflow.touch(keys)

    def store(
        self,
        keys: Sequence[BlockKey],
        block_ids: Sequence[int],
        parents: Sequence[BlockKey | None] | None = None,
    ) -> Job | None:
        """Plan to keep blocks; as many leading ones as slots can be had for.

        The source blocks must stay as they are until `settle` returns the job. `parents` are the
        keys of the blocks without which each is of no use, as `HostTier.reserve` takes them.
        """
        blocks = self.tier.reserve(keys, parents)
        self.counters.evicted_blocks = self.tier.evictions
        self.counters.refused_stores += len(keys) - len(blocks)
        if self.overflow is not None:
            self.overflow.write_behind.miss(keys[len(blocks) :])
        for key in keys[len(blocks) :]:
            self._absences.note(key, MissReason.NO_SLOT)
        return self._plan(Direction.STORE, blocks, block_ids[: len(blocks)]) if blocks else None

    def load(
        self, keys: Sequence[BlockKey], block_ids: Sequence[int], request_id: str | None = None
    ) -> Job | None:
        """Plan to bring readable blocks back; ids whose key is gone are reported as lost.

        Args:
            keys: of the blocks.
            block_ids: where to, for each key.
            request_id: who is told when they are there, while no forward waits for them.
        """
        found = [
            (self.tier.lookup(key), block_id) for key, block_id in zip(keys, block_ids, strict=True)
        ]
        lost = [block_id for block, block_id in found if block is None]
        self._lost += lost
        if lost and request_id is not None:
            self._lost_requests.append(request_id)
        blocks = [block for block, _ in found if block is not None]
        self.tier.pin(blocks)
        ids = [block_id for block, block_id in found if block is not None]
        if not blocks and request_id is None:
            return None
        return self._plan(Direction.LOAD, blocks, ids, request_id)

    def take_plan(
        self, has_forward: bool = True, by_layer: bool = False, step: int | None = None
    ) -> StepPlan:
        """Everything planned since the last call, for the workers."""
        loads, stores = self._new[Direction.LOAD], self._new[Direction.STORE]
        lost = tuple(self._lost)
        disk = self.overflow.take_plan() if self.overflow is not None else None
        waiting = tuple(self._lost_requests)
        plan = StepPlan(
            tuple(loads), tuple(stores), has_forward, by_layer, step, lost, disk, waiting
        )
        self._new = {Direction.STORE: [], Direction.LOAD: []}
        self._lost, self._lost_requests = [], []
        return plan

    def settle(self, report: StepReport) -> list[Flight]:
        """Take in what workers finished; returns the jobs that every rank is done with.

        From a failed load that some forward needed, the model may have computed on wrong bytes:
        every store then under way is discarded when it arrives.
        """
        self._take_in_pool(report)
        self.counters.layered_loads += report.layered_loads
        if report.unwaited_layers:
            self.counters.unwaited_layers += report.unwaited_layers
            self.discard_stores()
        self._note_bad(report)
        if any(map(self._misled_a_forward, [*report.failed, *report.corrupt])):
            self.discard_stores()
        done = [
            flight for job_id, n in report.finished.items() if (flight := self._land(job_id, n))
        ]
        for flight in done:
            self._end(flight)
        if self.overflow is not None and report.disk is not None:
            self.overflow.settle(report.disk)
        return done

    def _note_bad(self, report: StepReport) -> None:
        self._corrupt_layers = self._corrupt_layers or report.corrupt_layers
        for job_id in report.failed & self._flights.keys():
            flight = self._flights[job_id]
            flight.bad.update(range(len(flight.blocks)))
        for job_id in report.corrupt.keys() & self._flights.keys():
            flight = self._flights[job_id]
            flight.bad |= report.corrupt[job_id]
            flight.corrupt |= report.corrupt[job_id]

    def _take_in_pool(self, report: StepReport) -> None:
        """Slots that are not ready on every rank are not given out."""
        index = self.tier.index
        if report.num_slots is not None:
            index.limit(report.num_slots)
            lost = self._planned_slots - report.num_slots
            self.counters.lost_slots = max(self.counters.lost_slots, lost)
        if report.ready_slots is not None:
            index.open(report.ready_slots)

    def discard_stores(self) -> None:
        """Let no store that is now under way become readable."""
        for flight in self._flights.values():
            flight.discard = flight.discard or flight.direction is Direction.STORE

    def reset(self) -> None:
        """Forget every block, also those that are only arriving."""
        self.discard_stores()
        self.tier.clear()
        self._absences.clear()
        if self.overflow is not None:
            self.overflow.reset()

    def _plan(
        self,
        direction: Direction,
        blocks: list[Block],
        ids: Sequence[int],
        request_id: str | None = None,
    ) -> Job:
        slots = np.fromiter((block.slot for block in blocks), np.int64, len(blocks))
        seeds = np.fromiter((block.seed for block in blocks), np.int64, len(blocks))
        job = Job(self._next_job_id, np.asarray(ids, np.int64), slots, request_id, seeds)
        self._next_job_id += 1
        now = time.perf_counter()
        self._flights[job.id] = Flight(job, direction, blocks, self._num_ranks, now)
        self.counters.apart_loads += request_id is not None
        self._new[direction].append(job)
        return job

    def _misled_a_forward(self, job_id: int) -> bool:
        flight = self._flights.get(job_id)
        return (
            flight is not None
            and flight.direction is Direction.LOAD
            and flight.job.request_id is None
        )

    def _land(self, job_id: int, ranks: int) -> Flight | None:
        """Count ranks off; the flight if this was the last one."""
        flight = self._flights.get(job_id)
        if flight is None:
            return None
        flight.ranks_left -= ranks
        return self._flights.pop(job_id) if flight.ranks_left <= 0 else None

    def _end(self, flight: Flight) -> None:
        if flight.direction is Direction.LOAD:
            self._end_load(flight)
        else:
            self._end_store(flight)

    def _end_load(self, flight: Flight) -> None:
        if flight.corrupt:
            self._quarantine([flight.blocks[position] for position in sorted(flight.corrupt)])
        self.tier.unpin(flight.blocks)
        num_good = len(flight.blocks) - len(flight.bad)
        self.counters.loaded_blocks += num_good
        self.counters.loaded_bytes += num_good * self._block_bytes
        if num_good == len(flight.blocks):
            self.counters.load_seconds += time.perf_counter() - flight.planned_at
            return
        bad = [flight.blocks[position] for position in sorted(flight.bad)]
        self.counters.failed_loads += len(bad)
        self.tier.forget(bad)
        for block in bad:
            self._note_failed(block)
        if flight.bad != flight.corrupt:
            self._log_once(
                logging.WARNING,
                "A load failed; its tokens are computed again and its blocks forgotten.",
            )

    def _quarantine(self, blocks: list[Block]) -> None:
        """What these slots hold is not what was stored."""
        self.counters.corrupt_blocks += len(blocks)
        self.tier.quarantine(blocks)
        if self.overflow is not None:
            self.overflow.distrust([block.key for block in blocks])
        first = blocks[0]
        self._log_once(
            logging.ERROR,
            "Block %s came back from host slot %d, where it was brought from %s %.1f s ago, with "
            "other bytes than were stored, %s: its tokens are computed again%s. Test this "
            "machine's %s.",
            first.key.hex(),
            first.slot,
            "disk" if first.from_disk else "the GPU",
            time.monotonic() - first.since,
            self._corrupt_layers or "in some of its layers",
            ", and the slot is not used any more" if first.quarantined else "",
            "drive and memory" if first.from_disk else "memory",
        )

    def _end_store(self, flight: Flight) -> None:
        if not flight.failed and not flight.discard:
            self.tier.commit(flight.blocks)
            self.counters.stored_blocks += len(flight.blocks)
            self.counters.stored_bytes += len(flight.blocks) * self._block_bytes
            self.counters.store_seconds += time.perf_counter() - flight.planned_at
            return
        self.tier.abort(flight.blocks)
        if self.overflow is not None:
            self.overflow.write_behind.miss(block.key for block in flight.blocks)
        if flight.failed:
            self.counters.failed_stores += len(flight.blocks)
            for block in flight.blocks:
                self._note_failed(block)
            self._log_once(logging.WARNING, "A store failed; its blocks are not kept.")
        else:
            self.counters.discarded_stores += len(flight.blocks)

    def _note_evicted(self, block: Block) -> None:
        self._absences.note(block.key, MissReason.EVICTED)

    def _note_failed(self, block: Block) -> None:
        self._absences.note(block.key, MissReason.FAILED)

    def _log_once(self, level: int, message: str, *args: object) -> None:
        if message not in self._logged:
            self._logged.add(message)
            logger.log(level, f"{message} Later ones are only counted.", *args)
