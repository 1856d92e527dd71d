"""HostMemory: one anonymous mapping, populated and pinned range by range. Any thread."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from pathlib import Path

import torch

from kvortex.core import PoolAllocationError

MADV_DONTFORK, MADV_POPULATE_WRITE = 10, 23
CUDA_HOST_REGISTER_PORTABLE_MAPPED = 0x01 | 0x02
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_libc = ctypes.CDLL(None, use_errno=True)  # gives up the GIL during a call


class HostMemory:
    """`size` bytes at `address`; `bytes` is the uint8 tensor of all of them.

    The mapping is private: shared ones get huge pages only where shmem_enabled allows it, which is
    off by default. Children made by fork do not see it, or the kernel would copy every pinned page
    for each of them.

    Raises:
        OSError, OverflowError, ValueError: there is not so much address space.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._mapping: mmap.mmap | None = mmap.mmap(-1, size, flags=flags)
        with contextlib.suppress(OSError):
            self._mapping.madvise(MADV_DONTFORK)
        with contextlib.suppress(OSError, AttributeError):
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self.address = self.bytes.data_ptr()
        self._pinned: dict[int, int] = {}

    @property
    def pinned_bytes(self) -> int:
        """How many bytes are pinned now."""
        return sum(self._pinned.values())

    def populate(self, start: int, nbytes: int) -> None:
        """Have the kernel hand out the pages of a range that begins at one; several threads may.

        Raises:
            OSError: it has none left.
        """
        address, size = ctypes.c_void_p(self.address + start), ctypes.c_size_t(nbytes)
        if _libc.madvise(address, size, MADV_POPULATE_WRITE) == 0:
            return
        error = ctypes.get_errno()
        if error != errno.EINVAL:
            raise OSError(error, os.strerror(error))
        ctypes.memset(self.address + start, 0, nbytes)  # before Linux 5.14

    def pin(self, start: int, nbytes: int) -> None:
        """Pin and map a range into the GPU; no copy may span two of them.

        Raises:
            PoolAllocationError: CUDA's reason.
        """
        _register(self.address + start, nbytes)
        self._pinned[start] = nbytes

    def release(self, start: int) -> None:
        """Give pages that are not pinned back to the kernel: those from `start`, a page's, on."""
        if self._mapping is not None and start < self.size:
            self._mapping.madvise(mmap.MADV_DONTNEED, start)

    def close(self) -> None:
        """Unpin, and give the memory back with the last view of it. May be called twice."""
        for start in self._pinned:
            _unregister(self.address + start)
        self._pinned.clear()
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self._mapping = None  # not closed: that would take it from under a view someone still holds


def huge_pages_allowed() -> bool:
    """Whether the kernel may back anonymous memory with huge pages."""
    try:
        return "[never]" not in HUGE_PAGES.read_text()
    except OSError:
        return False


def _register(address: int, nbytes: int) -> None:
    cudart = torch.cuda.cudart()
    status = cudart.cudaHostRegister(address, nbytes, CUDA_HOST_REGISTER_PORTABLE_MAPPED)
    if int(status) != 0:
        raise PoolAllocationError(cudart.cudaGetErrorString(status))


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
