"""DiskStore: keeps blocks of one rank's host pool on a drive. Owned by one thread of a worker.

The scheduler side owns keys, slot numbers and policy, and sends jobs. Here they are only put into
queues; lanes, which have threads, do all reading, writing, waiting and checking.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Self

from kvortex.bell import Bell
from kvortex.checksum import num_pieces
from kvortex.disk.breaker import Breaker
from kvortex.disk.checksums import Checksums
from kvortex.disk.file import DiskFile
from kvortex.disk.job import BlockRead, DiskJob
from kvortex.disk.lane import Lane
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
    from kvortex.disk.lane import Answers, Row
    from kvortex.disk.slots import OpenFile
    from kvortex.host_pool import HostPool
    from kvortex.verification import Verification

logger = logging.getLogger(__name__)

LOST = {Status.ERROR, Status.CORRUPT, Status.STALE}
"""Of a block that the drive is to blame for; what came too late, or was not tried, may yet be."""
LOOK_S = 5.0
"""Between two looks at whether the files are where they were."""
LEAST_PATIENCE_S = 1.0
"""Before a late job counts as another error: a short stall is one error, whatever the deadline."""
TOO_SLOW = "it does not answer in time"
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
        self.counters = DiskCounters()
        self.num_slots = num_slots
        self.slot_bytes = pool.slot_bytes
        self._memory = pool.bytes.view(-1).numpy().data
        checksums = Checksums(pool, verification)
        self._pieces = num_pieces(pool.slot_bytes)
        # Parts save nothing but hashing: the kernel itself reads a block by many requests at once.
        self._most_parts = min(options.most_parts, self._pieces) if checksums.compares else 1
        self._read_deadline_s = options.read_deadline_s
        self._pace = Pace(options.max_write_bytes_per_s)
        self._reading = Breaker(f"reading from {disk_path}")
        self._writing = Breaker(f"writing to {disk_path}")
        self._jobs: dict[int, DiskJob] = {}
        self._ended: dict[int, frozenset[int]] = {}
        self._lost: dict[int, frozenset[int]] = {}
        self._unerased: set[int] = set()
        """Slots to erase for which no lane had room yet."""
        self._erasing: set[int] = set()
        self._told_corrupt = False
        self._next_look = time.monotonic() + LOOK_S
        self._looking = False
        self._to_wipe = self._wiping = False
        self._cache = OpenCache(
            disk_path, namespace, rank, num_slots, pool.slot_bytes, checksums.scheme, open_file
        )
        self._files = self._cache.files
        if not self._cache.is_there():  # a file system whose numbers mean nothing
            self._next_look = math.inf
        found = self._files.survivors
        self.counters.removed_caches = self._cache.removed
        self.counters.invalid_records = found.invalid
        self.counters.stale_blocks = len(found.stale)
        self._unerased.update(found.stale.tolist())
        self._generation = 1 + int(max(found.generations, default=0))
        self._answers: Answers = deque()
        self._answered = Bell()
        self._closing = Event()
        self._moves = Moves(
            self._files,
            self._memory,
            checksums,
            self._jobs,
            self._closing,
            self._cache.is_there,
            self._cache.renew,
        )
        shared = (self._answers, self._answered, self._closing)
        self._num_readers = options.readers
        self._reader = Lane("kvortex-disk-read", options.readers, self._moves.read, *shared)
        self._writers = [
            Lane(f"kvortex-disk-write-{number}", 1, self._moves.write, *shared)
            for number in range(options.writers)
        ]
        self._lanes = (self._reader, *self._writers)

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
        allowed = not self._closing.is_set() and not self._writing.is_off
        starts = [self._pace.appoint(self.slot_bytes, now) if allowed else None for _ in keys]
        job.deadline = max((s for s in starts if s is not None), default=now) + WRITE_PATIENCE_S
        self._jobs[job_id] = job
        rows: dict[Lane, list[Row]] = {}
        for position, (slot, start) in enumerate(zip(job.disk_slots, starts, strict=True)):
            if start is None:
                job.give_up(position, Status.REFUSED)
            else:
                row = (job_id, position, 0, 1, start)
                rows.setdefault(self._writer(slot), []).append(row)
        for lane, own in rows.items():
            self._push(job, lane, own)
        self._unerased -= {slot for at, slot in enumerate(job.disk_slots) if at not in job.failed}
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
        parts = max(1, min(self._most_parts, self._num_readers // max(1, count)))
        deadline = now + self._read_deadline_s
        job = DiskJob(job_id, keys, list(disk_slots), list(host_slots), deadline, parts)
        job.reads = [BlockRead.of(self._pieces) for _ in keys]
        self._jobs[job_id] = job
        if self._closing.is_set() or self._reading.is_off:
            for position in range(count):
                job.give_up(position, Status.REFUSED)
        else:
            rows = [
                (job_id, position, part, parts, deadline)
                for position in range(count)
                for part in range(parts)
            ]
            self._push(job, self._reader, rows)
        self._finish_if_ended(job)

    def erase(self, disk_slots: Iterable[int]) -> None:
        """Have slots forgotten, now and after a restart."""
        for slot in disk_slots:
            if 0 <= slot < self.num_slots:
                self._files.forget(slot)
                self._unerased.add(slot)
        self._push_erases()

    def clear(self) -> None:
        """Have everything forgotten, also what is being written; reads under way find nothing.

        Nothing of what is written from now on is left to the next life either: the weights may have
        been changed, and that one will begin with those that the namespace tells of. So the records
        can be wiped by one order, whatever else is written meanwhile.
        """
        self._files.renounce()
        self._to_wipe = True
        self._unerased.clear()
        self.erase(slot for job in self._jobs.values() if not job.reads for slot in job.disk_slots)

    def poll(self) -> StoreReport:
        """What became of jobs since the last call. After `close`, every job has ended."""
        self._take_answers()
        if self._closing.is_set():
            self._abandon_all()
        now = time.monotonic()
        self._judge_late(now)
        self._push_erases()
        self._look(now)
        self._try_again(now)
        ended, self._ended = self._ended, {}
        lost, self._lost = self._lost, {}
        self.counters.times_off = self._reading.times_off + self._writing.times_off
        return StoreReport(ended, lost, self._reading.is_off, self._writing.is_off)

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until a lane answered since the last wait; returns whether one did."""
        return bool(self._ended) or self._answered.wait(timeout)

    def close(self) -> None:
        """End what is being read and written, and give the rest up; what was to be erased, or
        replaced, is erased. May be called twice.

        A drive that does not answer within CLOSE_S keeps its threads and files, and its reads may
        yet write to the pool's memory.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        for lane in self._lanes:
            lane.wake()
        deadline = time.monotonic() + CLOSE_S
        stuck = [
            lane for lane in self._lanes if not lane.join(max(0.0, deadline - time.monotonic()))
        ]
        if stuck:  # they still use the files, and memory of the pool
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

    def _writer(self, slot: int) -> Lane:
        """All that changes a slot is done by one lane, in order."""
        return self._writers[slot % len(self._writers)]

    @staticmethod
    def _push(job: DiskJob, lane: Lane, rows: list[Row]) -> None:
        """What finds no room in the lane is refused."""
        for row in rows[lane.push(rows) :]:
            job.end(row[1], Status.REFUSED)

    def _push_erases(self) -> None:
        """What finds no room in its lane, or cannot be written now, is pushed later."""
        if self._closing.is_set() or self._writing.is_off:
            return
        if self._to_wipe and self._order(self._writer(0), WIPE):
            self._to_wipe, self._wiping = False, True
        for slot in list(self._unerased):
            if self._order(self._writer(slot), ERASE, slot):
                self._unerased.discard(slot)
                self._erasing.add(slot)

    def _look(self, now: float) -> None:
        """See from time to time whether the files are where they were: no use of them tells."""
        off = self._closing.is_set() or (self._reading.is_off and self._writing.is_off)
        if not off and not self._looking and now > self._next_look:
            self._looking = self._order(self._reader, LOOK)

    def _settle_look(self, now: float, *, there: bool) -> None:
        self._looking = False
        self._next_look = now + LOOK_S
        if there or (self._reading.is_off and self._writing.is_off):
            return
        logger.warning(
            "Disk cache: the files that are open are not those at %s any more, as if that was "
            "removed; blocks are computed instead, and it is looked for from time to time.",
            self._cache.path,
        )
        self._reading.switch_off(now)
        self._writing.switch_off(now)

    def _try_again(self, now: float) -> None:
        """See whether what is off works again, at no request's expense."""
        if self._closing.is_set() or not (self._reading.is_off or self._writing.is_off):
            return
        for is_write, (breaker, lane, patience) in enumerate(
            (
                (self._reading, self._reader, self._read_deadline_s),
                (self._writing, self._writer(0), WRITE_PATIENCE_S),
            )
        ):
            until = now + patience
            if breaker.wants_trial(now) and not self._order(lane, TRIAL, is_write, until):
                breaker.end_trial(now, well=False)

    @staticmethod
    def _order(lane: Lane, what: int, position: int = 0, until: float = 0) -> bool:
        """Push a row that belongs to no job; returns whether there was room."""
        return lane.push([(what, position, 0, 1, until)]) == 1

    def _take_answers(self) -> None:
        for _ in range(len(self._answers)):
            lane, row, status = self._answers.popleft()
            lane.under_way -= 1
            self._settle(row[0], row[1], status)

    def _settle(self, job_id: int, position: int, status: Status) -> None:
        """Take in a lane's answer."""
        if job_id < 0:
            self._settle_order(job_id, position, status)
            return
        job = self._jobs.get(job_id)
        if job is None:  # given up when the store closed over a drive that did not answer
            return
        self._judge(self._reading if job.reads else self._writing, status, job.reason)
        job.end(position, status)
        self._finish_if_ended(job)

    def _settle_order(self, what: int, position: int, status: Status) -> None:
        """Take in the answer to a row that belongs to no job."""
        now, well = time.monotonic(), status is Status.DONE
        if what == TRIAL:
            why = TOO_SLOW if status is Status.LATE else self._moves.why_off[position]
            breaker = self._writing if position else self._reading
            breaker.end_trial(now, well=well, reason=why)
            return
        if what == LOOK:
            self._settle_look(now, there=well)
            return
        if what == WIPE:
            self._wiping = False
            self._to_wipe = self._to_wipe or not well
        else:
            self._erasing.discard(position)
            if not well:
                self._unerased.add(position)
        if well:
            self._writing.succeed()
        else:
            self._writing.fail(now, "a record cannot be erased")

    @staticmethod
    def _judge(breaker: Breaker, status: Status, reason: str) -> None:
        if status is Status.DONE:
            breaker.succeed()
        elif status is Status.ERROR:
            breaker.fail(time.monotonic(), reason)

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
            if corrupt and not self._told_corrupt:
                self._told_corrupt = True
                logger.warning(
                    "Disk cache: a block came back with other bytes than were written; it is "
                    "computed again. See the drive's health. Later ones are only counted."
                )
        lost = frozenset(at for at, status in job.failed.items() if status in LOST)
        if lost:
            self._lost[job.id] = lost

    def _judge_late(self, now: float) -> None:
        """A drive that lets a job wait past its deadline is failing. As few jobs may be under way,
        none of which ends, each counts again whenever another patience has passed."""
        for job in self._jobs.values():
            if now <= job.deadline:
                continue
            patience = self._read_deadline_s if job.reads else WRITE_PATIENCE_S
            job.deadline = now + max(patience, LEAST_PATIENCE_S)
            if not job.slow:
                job.slow = job.unended
                self.counters.slow_blocks += len(job.slow)
            breaker = self._reading if job.reads else self._writing
            breaker.fail(now, TOO_SLOW)

    def _erase_the_rest(self) -> None:
        """After the lanes have ended."""
        self._take_answers()
        rest = self._unerased | self._erasing
        for job in self._jobs.values():
            if not job.reads:
                left = zip(job.disk_slots, job.parts_left, strict=True)
                rest |= {slot for slot, parts in left if parts > 0}
        if self._to_wipe or self._wiping:
            self._files.wipe()
        for slot in rest:
            self._files.erase(slot)

    def _abandon_all(self) -> None:
        for job in list(self._jobs.values()):
            for position, left in enumerate(job.parts_left):
                if left:
                    job.give_up(position, Status.REFUSED)
            self._finish_if_ended(job)
