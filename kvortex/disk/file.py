"""DiskFile: one open file of the disk cache, past the page cache where that can be had."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from typing import Self

from kvortex.core import ConfigError
from kvortex.disk.format import PAGE

SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe of that name must not stop us
UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class DiskFile:
    """A regular file of ours, 0600, in an open folder; neither link nor anybody else's.

    Reads and writes are whole or an OSError, free the GIL, and may come from several threads.
    `direct` tells whether they bypass the page cache; then memory, offset and length of each must
    be multiples of PAGE.

    Raises:
        ConfigError: the name is taken by something that is not ours to write to.
        OSError: it cannot be opened.
    """

    _fd = -1

    def __init__(
        self, folder: int, name: str, *, create: bool = True, direct: bool = False
    ) -> None:
        self.name = name
        self._fd = open_own(folder, name, create=create)
        self.direct = direct and self._bypass_cache()

    @property
    def inode(self) -> tuple[int, int]:
        """What it is to the system, whatever its name: the numbers of device and inode."""
        found = os.fstat(self._fd)
        return found.st_dev, found.st_ino

    @property
    def size(self) -> int:
        """In bytes, as it is now."""
        return os.fstat(self._fd).st_size

    def allocate(self, size: int) -> bool:
        """Give it exactly `size` bytes; returns whether the disk has set them aside.

        Raises:
            OSError: they are not to be had; the file is as large as before.
        """
        before = self.size
        os.ftruncate(self._fd, min(size, before))
        while _libc.fallocate(self._fd, 0, 0, size) != 0:
            code = ctypes.get_errno()
            if code in UNSUPPORTED:
                os.ftruncate(self._fd, size)
                return False
            if code != errno.EINTR:
                os.ftruncate(self._fd, min(size, before))
                raise OSError(code, os.strerror(code))
        return True

    def read(self, memory: memoryview, offset: int) -> None:
        """Fill `memory` from `offset` on."""
        done = 0
        while done < len(memory):
            count = self._preadv(memory[done:], offset + done)
            if count == 0:
                raise OSError(errno.EIO, f"{self.name} ends at byte {offset + done}")
            done += count

    def write(self, memory: memoryview | bytes, offset: int) -> None:
        """Write all of `memory` from `offset` on."""
        done = 0
        while done < len(memory):
            count = self._pwritev(memory[done:], offset + done)
            if count == 0:
                raise OSError(errno.EIO, f"{self.name} takes nothing at byte {offset + done}")
            done += count

    def sync(self) -> None:
        """Have the drive keep what was written."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """May be called twice."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _preadv(self, memory: memoryview, offset: int) -> int:
        return os.preadv(self._fd, [memory], offset)

    def _pwritev(self, memory: memoryview | bytes, offset: int) -> int:
        return os.pwritev(self._fd, [memory], offset)

    def _bypass_cache(self) -> bool:
        """Some file systems refuse O_DIRECT when it is set, others when it is used."""
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            with mmap.mmap(-1, PAGE) as page:
                os.preadv(self._fd, [page], 0)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
            return False
        return True


def open_own(folder: int, name: str, *, create: bool) -> int:
    """A descriptor of a file that may be written; see DiskFile for the errors."""
    flags = os.O_RDWR | SAFE | (os.O_CREAT if create else 0)
    try:
        fd = os.open(name, flags, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.EISDIR, errno.ENXIO}:
            raise ConfigError(_foreign(name)) from None
        raise
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid != os.geteuid():
        os.close(fd)
        raise ConfigError(_foreign(name))
    if stat.S_IMODE(found.st_mode) != 0o600:
        os.fchmod(fd, 0o600)
    return fd


def _foreign(name: str) -> str:
    return f"{name} is a link, or not a file of this user; remove it or name another disk_path"
