"""DiskStore: keeps blocks of one rank's host pool on a drive. Owned by one thread of a worker.

The scheduler side owns keys, slot numbers and policy, and sends jobs. Here they are only put into
queues; lanes, which have threads, do all reading, writing, waiting and checking.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Self

from kvortex.checksum import num_pieces
from kvortex.disk.checksums import Checksums
from kvortex.disk.erasures import Erasures
from kvortex.disk.file import DiskFile
from kvortex.disk.health import DriveHealth
from kvortex.disk.job import BlockRead, DiskJob
from kvortex.disk.lanes import Lanes
from kvortex.disk.moves import ERASE, LOOK, TRIAL, WIPE, WRITE_PATIENCE_S, Moves
from kvortex.disk.opening import OpenCache
from kvortex.disk.pace import Pace
from kvortex.disk.report import DiskCounters, StoreReport
from kvortex.disk.slots import Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from kvortex.core import BlockKey
    from kvortex.disk.format import Namespace, Survivors
    from kvortex.disk.lane import Lane, Row
    from kvortex.disk.slots import OpenFile
    from kvortex.host_pool import HostPool
    from kvortex.verification import Verification

logger = logging.getLogger(__name__)

LOST = {Status.ERROR, Status.CORRUPT, Status.STALE}
"""Of a block that the drive is to blame for; what came too late, or was not tried, may yet be."""
CLOSE_S = 10.0
"""For the lanes to end the row that each works on."""


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """How hard a drive is driven. As many threads read, or write, as its queue shall be deep: each
    waits in the kernel for a block of its own. fio was at its best at 8 on a virtio drive (see the
    bandwidth rows of bench_disk)."""

    max_write_bytes_per_s: float | None = None
    read_deadline_s: float = 1.0
    """How long a read is worth waiting for."""
    readers: int = 8
    writers: int = 8
    most_parts: int = max(1, len(os.sched_getaffinity(0)) // 4)
    """In how many parts, by as many readers, one block may be read. On two busy cores the second
    part cost 50 us and the fourth 100 more, where each saves at most its share of the checksum (see
    the latency rows of bench_disk); whether it pays on many cores was not measured yet."""


class DiskStore:
    """Blocks of a host pool on a drive, under `disk_path/<namespace>/rank-<n>`.

    All calls come from one thread and none but `close` waits; nothing but opening raises. What
    cannot be read or written is told by `poll`. The scheduler side must not touch the slots of a
    job before it ended, nor erase or write a slot that another job uses.

    Args:
        disk_path: folder, made if it is not there; caches of other namespaces in it that no server
            holds stay as long as there is room.
        namespace: what the bytes depend on.
        rank: of this worker; each has a folder of its own.
        num_slots: on the disk; set aside at once. More than before keeps what there is, less
            gives up what is past the end.
        pool: whose slots are written and read.
        verification: how the checksums beside its slots are made, which then travel with the bytes;
            None if they mean nothing.
        open_file: makes a DiskFile.

    Raises:
        ConfigError: the folder cannot be used; the message says why.
    """

    def __init__(
        self,
        disk_path: Path,
        namespace: Namespace,
        rank: int,
        num_slots: int,
        pool: HostPool,
        options: DiskOptions = DiskOptions(),
        verification: Verification | None = None,
        open_file: OpenFile = DiskFile,
    ) -> None:
        self.num_slots = num_slots
        self.slot_bytes = pool.slot_bytes
        self._options = options
        self._pace = Pace(options.max_write_bytes_per_s)
        checksums, memory = Checksums(pool, verification), pool.bytes.view(-1).numpy().data
        self._pieces = num_pieces(pool.slot_bytes)
        # Parts save nothing but hashing: the kernel itself reads a block by many requests at once.
        self._most_parts = min(options.most_parts, self._pieces) if checksums.compares else 1
        self._jobs: dict[int, DiskJob] = {}
        self._ended: dict[int, frozenset[int]] = {}
        self._lost: dict[int, frozenset[int]] = {}
        self._closing = Event()
        self._cache = cache = OpenCache(
            disk_path, namespace, rank, num_slots, pool.slot_bytes, checksums.scheme, open_file
        )
        self._files, found = cache.files, cache.files.survivors
        self.counters = DiskCounters.at_start(found, cache.removed)
        self._generation = 1 + int(max(found.generations, default=0))
        moves = Moves(
            self._files, memory, checksums, self._jobs, self._closing, cache.is_there, cache.renew
        )
        self._lanes = lanes = Lanes(moves, options.readers, options.writers, self._closing)
        self._health = DriveHealth(
            disk_path, cache.watched, lanes.orders, options.read_deadline_s, moves.why_off
        )
        self._erasures = Erasures(self._files, lanes.order_change, self._health.writing)
        self._erasures.add(found.stale.tolist())

    @property
    def survivors(self) -> Survivors:
        """What was on the disk when it was opened, as it was then."""
        return self._files.survivors

    @property
    def direct(self) -> bool:
        """Whether the page cache is bypassed."""
        return self._files.direct

    def write(
        self,
        job_id: int,
        keys: Sequence[BlockKey],
        host_slots: Sequence[int],
        disk_slots: Sequence[int],
    ) -> None:
        """Have blocks copied to the disk, each replacing what its slot there holds."""
        now = time.monotonic()
        job = DiskJob(job_id, keys, list(disk_slots), list(host_slots), now, parts=1)
        job.generation = self._generation
        self._generation += len(keys)
        allowed = not self._closing.is_set() and not self._health.writing.is_off
        starts = [self._pace.appoint(self.slot_bytes, now) if allowed else None for _ in keys]
        job.deadline = max((s for s in starts if s is not None), default=now) + WRITE_PATIENCE_S
        self._jobs[job_id] = job
        rows: dict[Lane, list[Row]] = {}
        for position, (slot, start) in enumerate(zip(job.disk_slots, starts, strict=True)):
            if start is None:
                job.give_up(position, Status.REFUSED)
            else:
                row = (job_id, position, 0, 1, start)
                rows.setdefault(self._lanes.writer(slot), []).append(row)
        for lane, own in rows.items():
            self._push(job, lane, own)
        self._erasures.replace(s for at, s in enumerate(job.disk_slots) if at not in job.failed)
        self._finish_if_ended(job)

    def read(
        self,
        job_id: int,
        keys: Sequence[BlockKey],
        disk_slots: Sequence[int],
        host_slots: Sequence[int],
    ) -> None:
        """Have blocks copied to host memory, where each is checked to be that of its key."""
        now = time.monotonic()
        count = len(keys)
        parts = max(1, min(self._most_parts, self._options.readers // max(1, count)))
        deadline = now + self._options.read_deadline_s
        job = DiskJob(job_id, keys, list(disk_slots), list(host_slots), deadline, parts)
        job.reads = [BlockRead.of(self._pieces) for _ in keys]
        self._jobs[job_id] = job
        if self._closing.is_set() or self._health.reading.is_off:
            for position in range(count):
                job.give_up(position, Status.REFUSED)
        else:
            rows = [
                (job_id, position, part, parts, deadline)
                for position in range(count)
                for part in range(parts)
            ]
            self._push(job, self._lanes.reader, rows)
        self._finish_if_ended(job)

    def erase(self, disk_slots: Iterable[int]) -> None:
        """Have slots forgotten, now and after a restart."""
        self._erasures.add(disk_slots)
        if not self._closing.is_set():
            self._erasures.push()

    def clear(self) -> None:
        """Have everything forgotten, also what is being written; reads under way find nothing.

        Nothing of what is written from now on is left to the next life either: the weights may have
        been changed, and that one will begin with those that the namespace tells of. So the records
        can be wiped by one order, whatever else is written meanwhile.
        """
        self._erasures.add_all()
        self.erase(slot for job in self._jobs.values() if not job.reads for slot in job.disk_slots)

    def poll(self) -> StoreReport:
        """What became of jobs since the last call. After `close`, every job has ended."""
        self._take_answers()
        health = self._health
        if self._closing.is_set():
            self._abandon_all()
        else:
            now = time.monotonic()
            self.counters.slow_blocks += health.judge_late(self._jobs.values(), now)
            self._erasures.push()
            health.check(now)
        ended, self._ended = self._ended, {}
        lost, self._lost = self._lost, {}
        self.counters.times_off = health.reading.times_off + health.writing.times_off
        return StoreReport(ended, lost, health.reading.is_off, health.writing.is_off)

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until a lane answered since the last wait; returns whether one did."""
        return bool(self._ended) or self._lanes.answered.wait(timeout)

    def close(self) -> None:
        """End what is being read and written, and give the rest up; what was to be erased, or
        replaced, is erased. May be called twice.

        A drive that does not answer within CLOSE_S keeps its threads and files, and its reads may
        yet write to the pool's memory.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        if not self._lanes.end(CLOSE_S):  # they still use the files, and memory of the pool
            logger.warning("Disk cache: the drive has not answered; left to itself.")
            return
        try:
            self._erase_the_rest()
            self._files.sync()
        except OSError as error:
            logger.warning("Disk cache: what was written last may be lost (%s).", error)
        self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _push(job: DiskJob, lane: Lane, rows: list[Row]) -> None:
        """What finds no room in the lane is refused."""
        for row in rows[lane.push(rows) :]:
            job.end(row[1], Status.REFUSED)

    def _take_answers(self) -> None:
        for (what, position, *_), status in self._lanes.take():
            if what in {ERASE, WIPE}:
                self._erasures.settle(what, position, well=status is Status.DONE)
            elif what in {LOOK, TRIAL}:
                self._health.settle(what, position, status)
            elif what in self._jobs:  # else given up when the store closed over a drive that hung
                job = self._jobs[what]
                self._health.judge(job, status)
                job.end(position, status)
                if not job.reads:
                    well = status is Status.DONE
                    self._erasures.replaced(job.disk_slots[position], well=well)
                self._finish_if_ended(job)

    def _finish_if_ended(self, job: DiskJob) -> None:
        if job.left:
            return
        del self._jobs[job.id]
        moved, is_read = len(job.keys) - len(job.failed), bool(job.reads)
        self.counters.count_move(is_read=is_read, blocks=moved, slot_bytes=self.slot_bytes)
        self._ended[job.id] = frozenset(job.failed)
        if job.failed:
            self.counters.count_failures(job)
            corrupt = [at for at, status in job.failed.items() if status is Status.CORRUPT]
            self.erase(job.disk_slots[position] for position in corrupt)
            if corrupt:
                self._health.tell_corrupt()
        lost = frozenset(at for at, status in job.failed.items() if status in LOST)
        if lost:
            self._lost[job.id] = lost

    def _erase_the_rest(self) -> None:
        """After the lanes have ended."""
        self._take_answers()
        writes = (job for job in self._jobs.values() if not job.reads)
        self._erasures.finish(job.disk_slots[at] for job in writes for at in job.unended)

    def _abandon_all(self) -> None:
        for job in list(self._jobs.values()):
            for position in job.unended:
                job.give_up(position, Status.REFUSED)
            self._finish_if_ended(job)
