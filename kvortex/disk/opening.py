"""OpenCache: one rank's cache, from the setting to open files, with refusals that help."""

from __future__ import annotations

import errno
import logging
import os
import secrets
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from kvortex.config import GIB
from kvortex.core import ConfigError
from kvortex.disk.folder import CHECKSUMS, LIFE, NO_ROOM, ROOT_LOCK, RankFolder
from kvortex.disk.format import FORMAT, RecordFormat, stride
from kvortex.disk.neighbours import Neighbours
from kvortex.disk.slots import SlotFiles

if TYPE_CHECKING:
    from pathlib import Path

    from kvortex.disk.format import Namespace
    from kvortex.disk.scheme import Scheme
    from kvortex.disk.slots import OpenFile

logger = logging.getLogger(__name__)


class OpenCache:
    """The folder of a rank and the `files` in it; `removed` counts caches that made room.

    Raises:
        ConfigError: it cannot be used; the message says why, and what to write instead.
    """

    def __init__(
        self,
        disk_path: Path,
        namespace: Namespace,
        rank: int,
        num_slots: int,
        slot_bytes: int,
        scheme: Scheme,
        open_file: OpenFile,
    ) -> None:
        digest = namespace.digest(slot_bytes, scheme)
        self._record_format = RecordFormat(digest, rank, slot_bytes)
        self._life = secrets.token_hex(16)
        self._open_folder = partial(RankFolder, disk_path, digest, rank)
        about = {
            "format": FORMAT,
            "rank": rank,
            "slot_bytes": slot_bytes,
            "num_slots": num_slots,
            CHECKSUMS: scheme.as_dict(),
            "namespace": dict(namespace.description),
            LIFE: self._life,
        }
        self._renewing = Lock()
        try:
            self._folder = self._open_folder()
            try:
                self._folder.describe(about)
                self.files = self._make_files(num_slots, open_file)
            except BaseException:
                self._folder.close()
                raise
        except (ConfigError, OSError) as error:
            told = _cannot_use(disk_path, error, num_slots * stride(slot_bytes))
            raise ConfigError(told) from error
        self._warn(disk_path, num_slots * stride(slot_bytes))

    @property
    def watched(self) -> Path | None:
        """The folder; None where a file system's numbers mean nothing, by which files are told."""
        return self._folder.path if self.is_there() else None

    def is_there(self) -> bool:
        """Whether the open files are where they were; deleted ones can be used as well as any.

        May be called on any lane.
        """
        with self._renewing:
            return self.files.is_at(self._folder.path)

    def renew(self) -> None:
        """Have the files open that are in the folder now, where its mount vanished or returned.

        Only those of this very life are used again: nothing is made in what may be the bare folder
        below a mount, and a cache that another server had meanwhile is left to the next start. May
        be called on any lane.

        Raises:
            OSError: they are not there.
        """
        with self._renewing:
            if self.files.is_at(self._folder.path):
                return
            self.files.let_go()
            self._folder.close()  # else its file system could not be mounted anew
            try:
                folder = self._open_folder(self._life)
                try:
                    self.files.reopen(folder.fd)
                except BaseException:
                    folder.close()
                    raise
            except ConfigError as error:
                raise OSError(errno.ENODEV, str(error)) from None
            self._folder = folder

    def close(self) -> None:
        """May be called twice."""
        self.files.close()
        self._folder.close()

    def _make_files(self, num_slots: int, open_file: OpenFile) -> SlotFiles:
        """Set the slots aside; caches of others stay as far as there is room beside."""
        with self._folder.nobody_else_opening():
            others = Neighbours(self._folder.root, self._folder.namespace)
            while True:
                try:
                    files = SlotFiles(self._folder.fd, self._record_format, num_slots, open_file)
                    break
                except OSError as error:
                    if error.errno not in NO_ROOM or not others.make_room():
                        raise
            if files.preallocated:
                others.leave_spare()
            else:  # nobody knows whether there will be room for both
                others.leave()
            self.removed = others.removed
        return files

    def _warn(self, disk_path: Path, size: int) -> None:
        if self.removed:
            logger.warning(
                "Disk cache: removed %d that other models, weights or settings left at %s, to make "
                "room.",
                self.removed,
                disk_path,
            )
        there = (("O_DIRECT", self.files.direct), ("fallocate", self.files.preallocated))
        if lacks := [what for what, has in there if not has]:
            logger.warning(
                "Disk cache: the file system of %s has no %s; it works, with less speed or less "
                "certainty that there is room.",
                disk_path,
                " and no ".join(lacks),
            )
        free = _free_bytes(disk_path)
        if not self.files.preallocated and 0 < free < size:  # some say 0 and have no limit
            logger.warning(
                "Disk cache: %.2f GiB are free at %s, and a rank's share of disk_pool_gb is %.2f "
                "GiB; blocks will be refused once it is full.",
                free / GIB,
                disk_path,
                size / GIB,
            )


def disk_slots_in_pool(disk_pool_gb: float, slot_bytes: int, num_ranks: int = 1) -> int:
    """How many slots each rank's share of the disk pool holds.

    Raises:
        ConfigError: not even one.
    """
    num_slots = int(disk_pool_gb * GIB) // num_ranks // stride(slot_bytes)
    if num_slots < 1:
        least = stride(slot_bytes) * num_ranks / GIB
        raise ConfigError(
            f"disk_pool_gb={disk_pool_gb:g}: one KV block takes {stride(slot_bytes)} bytes of disk "
            f"on each of {num_ranks} rank(s); use at least disk_pool_gb={least * 1.01:.3g}"
        )
    return num_slots


def _cannot_use(disk_path: Path, error: Exception, size: int) -> str:
    """What is wrong with the folder, and what to write instead."""
    told = f"disk_path={str(disk_path)!r}: "
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return (
            f"{told}{_free_bytes(disk_path) / GIB:.2f} GiB are free there, and a rank's share of "
            f"disk_pool_gb is {size / GIB:.2f} GiB; lower disk_pool_gb"
        )
    if isinstance(error, BlockingIOError):
        return (
            f"{told}another process has held {ROOT_LOCK} there for too long; end it, or name "
            "another disk_path"
        )
    if isinstance(error, OSError):
        return f"{told}{error.strerror}; name a folder of a local drive that you may write to"
    return f"{told}{error}"


def _free_bytes(disk_path: Path) -> int:
    """At it, or where it would be made."""
    there = next(path for path in (disk_path, *disk_path.parents) if path.exists())
    room = os.statvfs(there)
    return room.f_bavail * room.f_frsize
