"""Contents: what is in one rank's folder, as far as it can be read, for those who only look."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

from kvortex.core import ConfigError
from kvortex.disk.file import open_own
from kvortex.disk.folder import CHECKSUMS, LIFE, RECORDS, SLOTS, opened_file, read_about
from kvortex.disk.format import PAGE, RECORD_BYTES, RecordFormat, peek, stride
from kvortex.disk.recount import recount
from kvortex.disk.scheme import Scheme
from kvortex.disk.verified import Verdict

if TYPE_CHECKING:
    from kvortex.disk.format import Record, Survivors

LARGEST_TABLE = 1 << 30
LARGEST_SLOT = 1 << 32
"""A description that speaks of more was not written by us."""


class Contents:
    """An open rank's folder: what it says of itself, its table of records and what is valid in it.

    `unreadable` says of each file why it could not be read, or not all of it.
    """

    def __init__(self, folder: int, namespace: str, rank: int) -> None:
        self._folder = folder
        self.unreadable: dict[str, str] = {}
        self.has_table = True
        """Whether records could be read, or there is nothing to have any."""
        self.about: dict[str, Any] = read_about(folder)
        self._room = self._size(SLOTS)  # before: a server that starts makes it as large as it likes
        self.packed = self._read_records()
        self._format, self.slot_bytes = self._with_size(bytes.fromhex(namespace), rank)
        self._scheme = Scheme.read(self.about.get(CHECKSUMS), self.slot_bytes)
        self.found: Survivors = self._format.read_table(memoryview(self.packed))

    def count_damaged(self) -> int:
        """Of the records that are not valid, those that are not what was written there."""
        if not self.found.invalid:
            return 0
        damaged = self._format.damaged(memoryview(self.packed))
        now = self._read_again(0, len(self.packed)) if damaged else None
        if now is None:
            return len(damaged)
        rows = (slice(slot * RECORD_BYTES, (slot + 1) * RECORD_BYTES) for slot in damaged)
        return sum(now[row] == self.packed[row] for row in rows)  # else they were half written

    def cut_off(self) -> dict[str, str]:
        """What says that records are missing at the end of the table, of which a server makes as
        many as it has slots; one that starts has fewer for a moment."""
        # The page behind the last slot is for trials.
        slots = (self._room - PAGE) // stride(self.slot_bytes) if self.knows_size else 0
        records = len(self.packed) // RECORD_BYTES
        if not self.has_table or records >= slots:
            return {}
        return {RECORDS: f"ends after {records} of {slots} records"}

    def check(self, slot: int) -> Verdict:
        """Whether a block that was found is what was written.

        Nothing keeps a server from starting meanwhile. It takes a slot's record away before it
        writes to the slot: bytes are not the record's only where that is there still.
        """
        record = peek(self.packed, slot)
        if self._scheme is None or record is None:
            return Verdict.NOT_VERIFIABLE
        verdict, why = self._compare(self._scheme, slot, record)
        if verdict is not Verdict.GOOD and self._is_changed(slot):
            return Verdict.CHANGED
        if why is not None:
            self.unreadable.setdefault(SLOTS, why)
        return verdict

    def is_as_it_was(self) -> bool:
        """Whether no server has opened the cache since, and nobody removed it."""
        return read_about(self._folder).get(LIFE) == self.about.get(LIFE)

    def _is_changed(self, slot: int) -> bool:
        start = slot * RECORD_BYTES
        now = self._read_again(start, RECORD_BYTES)
        return now is not None and now != self.packed[start : start + RECORD_BYTES]

    def _read_again(self, start: int, size: int) -> bytearray | None:
        """Records as they are by now; None if the drive fails, which is nobody's change."""
        try:
            with opened_file(RECORDS, self._folder) as file:
                return read_whole(file, size, start)
        except FileNotFoundError:
            return bytearray()
        except OSError:
            return None

    def _with_size(self, digest: bytes, rank: int) -> tuple[RecordFormat, int]:
        """How to read the records, and a slot's size: what they tell of it is known to be whole,
        and outlives what the folder says of itself."""
        said = _slot_bytes(self.about)
        told = RecordFormat(digest, rank, 0).told_slot_bytes(memoryview(self.packed))
        self.knows_size = told is not None or said is not None
        size = told or said or 1
        return RecordFormat(digest, rank, size), size

    def _compare(self, scheme: Scheme, slot: int, record: Record) -> tuple[Verdict, str | None]:
        """And why it could not be read."""
        try:
            with opened_file(SLOTS, self._folder) as file:
                block = read_whole(file, self.slot_bytes, slot * stride(self.slot_bytes))
        except OSError as error:
            return Verdict.UNREAD, why_unreadable(self._folder, SLOTS, error)
        whole = len(block) == self.slot_bytes
        same = whole and recount(scheme, record.key, memoryview(block)) == record.checksum
        return Verdict.GOOD if same else Verdict.CORRUPT, None

    def _read_records(self) -> bytearray:
        try:
            with opened_file(RECORDS, self._folder) as file:
                size = os.fstat(file).st_size
                if size > LARGEST_TABLE:
                    self.unreadable[RECORDS] = f"is larger than {LARGEST_TABLE} bytes"
                packed = read_whole(file, min(size, LARGEST_TABLE), 0)
        except OSError as error:
            # A start that was cut off leaves neither file; then there is nothing to be missed.
            if not isinstance(error, FileNotFoundError) or self._has(RECORDS) or self._has(SLOTS):
                self.unreadable[RECORDS] = why_unreadable(self._folder, RECORDS, error)
                self.has_table = False
            return bytearray()
        del packed[len(packed) // RECORD_BYTES * RECORD_BYTES :]
        return packed

    def _has(self, name: str) -> bool:
        return self._size(name) >= 0

    def _size(self, name: str) -> int:
        """Of a file, or less than nothing."""
        try:
            return os.stat(name, dir_fd=self._folder, follow_symlinks=False).st_size
        except OSError:
            return -1


def why_unreadable(folder: int | None, name: str, error: OSError) -> str:
    """What `error` says of a name in an open folder, in words that fit behind the name."""
    try:
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return "is not there"
    except OSError:
        mode = 0
    if stat.S_ISLNK(mode):
        return "is a link"
    if error.errno == errno.ENOTDIR:
        return "is no folder"
    if error.errno == errno.ENOENT:  # as `opened_file` says
        return "is no file"
    return f"cannot be read: {error.strerror}"


def why_untried(folder: int, name: str) -> str | None:
    """What keeps us from trying a lock in an open folder; None if nothing does, or it is away."""
    try:
        os.close(open_own(folder, name, create=False))
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    except ConfigError:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            return "is a link, or no file"
        return f"belongs to user {found.st_uid}"
    return None


def read_whole(file: int, size: int, offset: int) -> bytearray:
    """`size` bytes of an open file, or fewer where it ends before.

    Raises:
        OSError: the drive does not give them, be it only the last ones.
    """
    found, done = bytearray(size), 0
    with memoryview(found) as memory:
        while done < size:
            count = os.preadv(file, [memory[done:]], offset + done)
            if count == 0:
                break
            done += count
    del found[done:]
    return found


def _slot_bytes(about: dict[str, Any]) -> int | None:
    told = about.get("slot_bytes")
    return told if type(told) is int and 0 < told < LARGEST_SLOT else None
