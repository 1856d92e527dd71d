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
    from kvortex.disk.lane import Row, Work
    from kvortex.disk.slots import SlotFiles

logger = logging.getLogger(__name__)

ERASE, WIPE, TRIAL, LOOK = -1, -2, -3, -4
"""Instead of a job: erase the slot that is the position; erase all records; see whether the drive
works, in time; see whether the files are where they were."""
WRITE_PATIENCE_S = 5.0
"""A block that could not be written so long after its appointment is given up: its host slot is
needed."""


class Moves:
    """What lanes do with a row: job, position, part, parts, and the second at which a block may be
    written, or until which it is worth reading.

    Args:
        files: of the disk slots.
        memory: the host slots, one behind the other.
        checksums: of records.
        jobs: by id.
        closing: set, nobody waits for an appointment any more.
        is_there: tells whether the files are where they were.
        renew: has them opened anew, if they are not.
    """

    def __init__(
        self,
        files: SlotFiles,
        memory: memoryview,
        checksums: Checksums,
        jobs: Mapping[int, DiskJob],
        closing: Event,
        is_there: Callable[[], bool],
        renew: Callable[[], None],
    ) -> None:
        self._files = files
        self._memory = memory
        self._checksums = checksums
        self._jobs = jobs
        self._closing = closing
        self._is_there = is_there
        self._renew = renew
        self._host_slots = len(memory) // files.slot_bytes
        self.why_off = ["", ""]
        """Of the last trial of reading, and of writing, that failed: why."""

    def write(self, row: Row) -> Status:
        """Write a block when its time has come, or erase a slot."""
        return self._guarded(self._carry_out if row[0] < 0 else self._write, row)

    def read(self, row: Row) -> Status:
        """Read a part of a block unless that is too late; the last part to end checks the whole."""
        job_id, position, part, parts, _deadline = row
        if job_id < 0:
            return self._guarded(self._carry_out, row)
        job = self._jobs[job_id]
        block = job.reads[position]
        status = self._guarded(self._read_part, row)
        if status is not Status.DONE:
            block.broken.append(part)
        if next(block.ended) == parts and not block.broken:
            return self._checked(job, position)
        return status

    def _guarded(self, move: Work, row: Row) -> Status:
        """An I/O thread outlives whatever happens in it."""
        try:
            return move(row)
        except OSError as error:
            reason = error.strerror or str(error)
        except Exception as error:
            logger.exception("Disk cache: a block could not be moved.")
            reason = repr(error)
        job = self._jobs.get(row[0])  # none: an order, or given up when the store closed
        if job is not None:
            job.reason = reason
        elif row[0] == TRIAL:
            self.why_off[row[1]] = reason
        return Status.ERROR

    def _carry_out(self, row: Row) -> Status:
        """An order that belongs to no job."""
        what, position, _part, _parts, deadline = row
        if what == ERASE:
            self._files.erase(position)
        elif what == WIPE:
            self._files.wipe()
        elif what == LOOK:
            return Status.DONE if self._is_there() else Status.ERROR
        else:
            self._renew()
            self._files.try_out(writes=bool(position))
            if time.monotonic() > deadline:
                return Status.LATE
        return Status.DONE

    def _write(self, row: Row) -> Status:
        job_id, position, _part, _parts, start = row
        job = self._jobs[job_id]
        if not self._exists(job, position):
            return Status.REFUSED
        now = time.monotonic()
        if now > start + WRITE_PATIENCE_S:
            return Status.LATE
        if now < start and self._closing.wait(start - now):
            return Status.REFUSED
        block = self._host_block(job, position)
        self._files.write(
            job.disk_slots[position],
            job.keys[position],
            job.generation + position,
            block,
            self._checksums.of(job.host_slots[position], block),
        )
        return Status.DONE

    def _read_part(self, row: Row) -> Status:
        job_id, position, part, parts, deadline = row
        job = self._jobs[job_id]
        if not self._exists(job, position):
            return Status.REFUSED
        if time.monotonic() > deadline:
            return Status.LATE
        slot, digests = job.disk_slots[position], job.reads[position].digests
        if self._files.checksum(slot, job.keys[position]) is None:
            return Status.STALE
        first, end = len(digests) * part // parts, len(digests) * (part + 1) // parts
        block = self._host_block(job, position)
        self._files.read(slot, block, first, end)
        self._checksums.digest(block, digests, first, end)
        return Status.DONE

    def _checked(self, job: DiskJob, position: int) -> Status:
        """Whether what is in memory now is what was written under this key."""
        key = job.keys[position]
        checksum = self._files.checksum(job.disk_slots[position], key)
        if checksum is None:
            return Status.STALE
        digests, host_slot = job.reads[position].digests, job.host_slots[position]
        ours = self._checksums.arrive(key, checksum, digests, host_slot)
        return Status.DONE if ours else Status.CORRUPT

    def _exists(self, job: DiskJob, position: int) -> bool:
        """Another rank may have more slots, and be planned for before it is known who has least."""
        in_memory = 0 <= job.host_slots[position] < self._host_slots
        return in_memory and 0 <= job.disk_slots[position] < self._files.num_slots

    def _host_block(self, job: DiskJob, position: int) -> memoryview:
        size = self._files.slot_bytes
        start = job.host_slots[position] * size
        return self._memory[start : start + size]
