"""SlotFiles: the files of one rank's cache; writes, reads and erases single slots. On I/O threads.

A slot is written in the order record away, if there is one, bytes, record. It is read together with
its checksum. So whatever was interrupted or lost by the drive, a slot holds the bytes of its key or
none.
"""

from __future__ import annotations

import errno
import mmap
import random
import secrets
import time
from dataclasses import dataclass
from enum import IntEnum
from threading import local
from typing import TYPE_CHECKING, Self

import numpy as np

from kvortex.checksum import PIECE_BYTES
from kvortex.disk.file import DiskFile
from kvortex.disk.folder import RECORDS, SLOTS
from kvortex.disk.format import (
    NO_RECORD,
    PAGE,
    RECORD_BYTES,
    Record,
    RecordFormat,
    checksum_in,
    stride,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvortex.core import BlockIds, BlockKey
    from kvortex.disk.format import Survivors

    OpenFile = Callable[..., DiskFile]

WIPED_BYTES = 1 << 20
"""At once."""


class Status(IntEnum):
    """How a slot was read or written."""

    DONE = 0
    ERROR = 1
    """The drive failed."""
    CORRUPT = 2
    """The bytes are not those that were written."""
    STALE = 3
    """The slot does not hold this key."""
    LATE = 4
    """It came too late to be tried."""
    REFUSED = 5
    """The store is off, closed, or has too much to do."""


@dataclass(frozen=True, slots=True)
class _Files:
    """Both files as they were opened together; closed when nobody uses them any more."""

    records: DiskFile
    slots: DiskFile
    in_place: bool
    """Whether blocks in memory can be read and written as they are."""
    blank: bytearray
    """Of each slot, 1 if it is known that no record of it is in the file."""


class SlotFiles:
    """`num_slots` slots of `slot_bytes` in an open folder, and the table of their records.

    Calls that change a slot come from one thread at a time. Blocks in memory start at a page, or
    anywhere if `slot_bytes` is no multiple of one: then they are copied on their way.

    Args:
        folder: descriptor of the folder.
        record_format: of the records.
        num_slots: slots past it that are on the disk are given up.
        open_file: makes a DiskFile.

    Raises:
        ConfigError, OSError: the files cannot be had.
    """

    def __init__(
        self,
        folder: int,
        record_format: RecordFormat,
        num_slots: int,
        open_file: OpenFile = DiskFile,
    ) -> None:
        self.num_slots = num_slots
        self.slot_bytes = record_format.slot_bytes
        self._format = record_format
        self.stride = stride(record_format.slot_bytes)
        self._open_file = open_file
        self._bounce = local()
        self._files: _Files | None = self._opened(folder, create=True)
        try:
            # The page behind the last slot is for trials.
            self.preallocated = self._files.slots.allocate(num_slots * self.stride + PAGE)
            self._table = self._read_table(self._files.records)
            self.survivors: Survivors = record_format.read_table(memoryview(self._table))
            self._files.blank[:] = self._without_record()  # before invalid ones are forgotten
            self._forget_all_but(self.survivors.slots)
        except BaseException:
            self.close()
            raise
        self.direct = self._files.slots.direct
        """Whether reads and writes bypass the page cache."""

    def is_at(self, folder: Path) -> bool:
        """Whether the files that are open are those of a folder, as it is now."""
        files = self._files
        if files is None:
            return False
        for name, file in ((RECORDS, files.records), (SLOTS, files.slots)):
            try:
                found = (folder / name).lstat()
            except OSError:
                return False
            if (found.st_dev, found.st_ino) != file.inode:
                return False
        return True

    def let_go(self) -> None:
        """Have the files closed once nobody reads or writes them; from now on all calls fail."""
        self._files = None

    def reopen(self, folder: int) -> None:
        """Go on with the files of another open folder, which must be those that were let go.

        What slots hold is known from before, with the checksums: what is not there any more, or is
        something else by now, is found out when it is read.

        Raises:
            ConfigError, OSError: the files are not there, or cut off.
        """
        files = self._opened(folder, create=False)
        whole = self.num_slots * self.stride <= files.slots.size
        if not whole or files.records.size < len(self._table):
            raise OSError(errno.EIO, "its files were cut off")
        self._files = files

    def checksum(self, slot: int, key: BlockKey) -> int | None:
        """Of the bytes of a key that a slot holds; None if it does not."""
        return checksum_in(self._table, slot, key)

    def write(
        self, slot: int, key: BlockKey, generation: int, block: memoryview, checksum: int
    ) -> None:
        """Keep a block, and its checksum.

        Raises:
            OSError: the slot holds nothing.
        """
        files = self._current()
        if not files.blank[slot]:
            self.erase(slot)
        files.slots.write(self._padded(block, files), slot * self.stride)
        record = Record(key, generation, checksum, int(time.time()))
        packed = self._format.pack(slot, record)
        files.blank[slot] = 0
        files.records.write(packed, slot * RECORD_BYTES)
        self._table[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES] = packed

    def read(self, slot: int, block: memoryview, first: int, end: int) -> None:
        """Fill pieces `first` to `end` of a block, unverified.

        Raises:
            OSError: they could not be read.
        """
        files = self._current()
        part = block[first * PIECE_BYTES : end * PIECE_BYTES]
        offset = slot * self.stride + first * PIECE_BYTES
        if files.in_place:
            files.slots.read(part, offset)
        else:
            padded = self._scratch(len(part))
            files.slots.read(padded, offset)
            part[:] = padded[: len(part)]

    def erase(self, slot: int) -> None:
        """Have a slot hold nothing, also after a restart.

        Raises:
            OSError: after a restart it may hold again what it held.
        """
        self.forget(slot)
        files = self._current()
        files.records.write(NO_RECORD, slot * RECORD_BYTES)
        files.blank[slot] = 1

    def forget(self, slot: int) -> None:
        """Have a slot hold nothing until a restart; touches no file."""
        self._table[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES] = NO_RECORD

    def renounce(self) -> None:
        """Have all slots hold nothing, and what is written from now on be nobody's after a restart;
        touches no file."""
        self._format = RecordFormat(secrets.token_bytes(16), 0, self.slot_bytes)
        self._table = bytearray(len(self._table))

    def wipe(self) -> None:
        """Have the disk forget all records, also those written since `renounce`.

        Raises:
            OSError: after a restart slots may hold again what they held.
        """
        records, size, nothing = self._current().records, len(self._table), bytes(WIPED_BYTES)
        for start in range(0, size, WIPED_BYTES):
            records.write(memoryview(nothing)[: size - start], start)

    def try_out(self, *, writes: bool) -> None:
        """Have the drive read a page that it was given, or write one, and a record.

        To write is for the thread that changes slot 0.

        Raises:
            OSError: it does not work.
        """
        files, page = self._current(), self._scratch(PAGE)
        if writes:
            files.slots.write(page, self.num_slots * self.stride)
            files.records.write(bytes(self._table[:RECORD_BYTES]), 0)
        else:  # any block, as one place may be bad for ever
            magic = np.frombuffer(self._table, "<u8")[:: RECORD_BYTES // 8]
            used = np.flatnonzero(magic).tolist() or [0]
            files.slots.read(page, random.choice(used) * self.stride)

    def sync(self) -> None:
        """Have the drive keep what was written."""
        files = self._current()
        files.slots.sync()
        files.records.sync()

    def close(self) -> None:
        """May be called twice."""
        files, self._files = self._files, None
        if files is not None:
            files.records.close()
            files.slots.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self, folder: int, *, create: bool) -> _Files:
        records = self._open_file(folder, RECORDS, create=create)
        slots = self._open_file(folder, SLOTS, create=create, direct=True)
        in_place = not slots.direct or self.slot_bytes % PAGE == 0
        return _Files(records, slots, in_place, bytearray(self.num_slots))

    def _current(self) -> _Files:
        files = self._files
        if files is None:
            raise OSError(errno.ENODEV, "its folder is not there")
        return files

    def _read_table(self, records: DiskFile) -> bytearray:
        table = bytearray(self.num_slots * RECORD_BYTES)
        there = min(records.size, len(table))
        records.read(memoryview(table)[:there], 0)
        records.allocate(len(table))
        return table

    def _without_record(self) -> bytes:
        """Of each slot, 1 if there is nothing in the table."""
        rows = np.frombuffer(self._table, "<u8").reshape(self.num_slots, -1)
        return (~rows.any(axis=1)).tobytes()

    def _forget_all_but(self, slots: BlockIds) -> None:
        rows = np.frombuffer(self._table, np.uint8).reshape(-1, RECORD_BYTES)
        away = np.ones(len(rows), bool)
        away[slots] = False
        rows[away] = 0

    def _padded(self, block: memoryview, files: _Files) -> memoryview:
        if files.in_place:
            return block
        padded = self._scratch(len(block))
        padded[: len(block)] = block
        return padded

    def _scratch(self, length: int) -> memoryview:
        """This thread's own aligned memory, of whole pages."""
        if not hasattr(self._bounce, "memory"):
            self._bounce.memory = memoryview(mmap.mmap(-1, self.stride))
        memory: memoryview = self._bounce.memory
        return memory[: -(-length // PAGE) * PAGE]
