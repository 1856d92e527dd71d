"""Moves: how one block is written, read and checked. On the lanes' threads.

Nothing here raises: what goes wrong is a status.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from kvortex.disk.slots import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from threading import Event

    from kvortex.disk.checksums import Checksums
    from kvortex.disk.job import DiskJob
    from kvortex.disk.slots import SlotFiles

logger = logging.getLogger(__name__)

ERASE, WIPE, TRIAL = -1, -2, -3
"""Instead of a job: erase the slot that is the position; erase all records; see whether the drive
works, in time."""
WRITE_PATIENCE_S = 5.0
"""A block that could not be written so long after its appointment is given up: its host slot is
needed."""


class Moves:
    """What lanes do with a row: job, position, part, parts, and microseconds of the clock.

    Args:
        files: of the disk slots.
        memory: the host slots, one behind the other.
        checksums: of records.
        jobs: by id.
        closing: set, nobody waits for an appointment any more.
        renew: has the files opened anew, if they are not where they were.
    """

    def __init__(
        self,
        files: SlotFiles,
        memory: memoryview,
        checksums: Checksums,
        jobs: Mapping[int, DiskJob],
        closing: Event,
        renew: Callable[[], None],
    ) -> None:
        self._files = files
        self._memory = memory
        self._checksums = checksums
        self._jobs = jobs
        self._closing = closing
        self._renew = renew

    def write(self, row: list[int]) -> Status:
        """Write a block when its time has come, or erase a slot."""
        job_id, position, _part, _parts, start = row
        if job_id < 0:
            return _guarded(None, lambda: self._carry_out(job_id, position, start))
        job = self._jobs[job_id]
        if not self._exists(job, position):
            return Status.REFUSED
        now = microseconds(time.monotonic())
        if now > start + microseconds(WRITE_PATIENCE_S):
            return Status.LATE
        if now < start and self._closing.wait((start - now) / 1e6):
            return Status.REFUSED
        return _guarded(job, lambda: self._write(job, position))

    def read(self, row: list[int]) -> Status:
        """Read a part of a block unless that is too late; the last part to end checks the whole."""
        job_id, position, part, parts, deadline = row
        if job_id < 0:
            return _guarded(None, lambda: self._carry_out(job_id, position, deadline))
        job = self._jobs[job_id]
        block = job.reads[position]
        status = Status.LATE
        if not self._exists(job, position):
            status = Status.REFUSED
        elif microseconds(time.monotonic()) <= deadline:
            status = _guarded(job, lambda: self._read_part(job, position, part, parts))
        if status is not Status.DONE:
            block.broken.append(part)
        if next(block.ended) == parts and not block.broken:
            return self._checked(job, position)
        return status

    def _carry_out(self, what: int, position: int, deadline: int) -> Status:
        """An order that belongs to no job."""
        if what == ERASE:
            self._files.erase(position)
        elif what == WIPE:
            self._files.wipe()
        else:
            self._renew()
            self._files.try_out(writes=bool(position))
            if microseconds(time.monotonic()) > deadline:
                return Status.LATE
        return Status.DONE

    def _write(self, job: DiskJob, position: int) -> Status:
        block = self._host_block(job, position)
        self._files.write(
            job.disk_slots[position],
            job.keys[position],
            job.generation + position,
            block,
            self._checksums.of(job.host_slots[position], block),
        )
        return Status.DONE

    def _read_part(self, job: DiskJob, position: int, part: int, parts: int) -> Status:
        slot, digests = job.disk_slots[position], job.reads[position].digests
        record = self._files.record(slot)
        if record is None or record.key != job.keys[position]:
            return Status.STALE
        first, end = (len(digests) * p // parts for p in (part, part + 1))
        block = self._host_block(job, position)
        self._files.read(slot, block, first, end)
        self._checksums.digest(block, digests, first, end)
        return Status.DONE

    def _checked(self, job: DiskJob, position: int) -> Status:
        """Whether what is in memory now is what was written under this key."""
        key, record = job.keys[position], self._files.record(job.disk_slots[position])
        if record is None or record.key != key:
            return Status.STALE
        digests, host_slot = job.reads[position].digests, job.host_slots[position]
        ours = self._checksums.arrive(key, record, digests, host_slot)
        return Status.DONE if ours else Status.CORRUPT

    def _exists(self, job: DiskJob, position: int) -> bool:
        """Another rank may have more slots, and be planned for before it is known who has least."""
        host_slots = len(self._memory) // self._files.slot_bytes
        in_memory = 0 <= job.host_slots[position] < host_slots
        return in_memory and 0 <= job.disk_slots[position] < self._files.num_slots

    def _host_block(self, job: DiskJob, position: int) -> memoryview:
        size = self._files.slot_bytes
        start = job.host_slots[position] * size
        return self._memory[start : start + size]


def microseconds(seconds: float) -> int:
    """As a number for a ring."""
    return int(seconds * 1e6)


def _guarded(job: DiskJob | None, move: Callable[[], Status]) -> Status:
    """An I/O thread outlives whatever happens in it."""
    try:
        return move()
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:
        logger.exception("Disk cache: a block could not be moved.")
        reason = repr(error)
    if job is not None:
        job.reason = reason
    return Status.ERROR
