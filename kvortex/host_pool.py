"""HostPool: one arena of host memory cut into slots, pinned and mapped into the GPU if any."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from kvortex.config import GIB
from kvortex.core import ConfigError, PoolAllocationError

if TYPE_CHECKING:
    from types import TracebackType

TOUCH_THREADS = 16
TOUCH_BYTES = 256 << 20
CUDA_HOST_REGISTER_PORTABLE_MAPPED = 0x01 | 0x02


class HostPool:
    """`num_slots` slots of `slot_bytes`; `bytes` is the uint8 tensor (num_slots, slot_bytes).

    Memory is anonymous, on huge pages where the kernel grants them, touched by several threads
    before it is pinned: pinning 8 GiB took 0.33 s so on an H200's host, 5.8 s from one thread.

    Raises:
        PoolAllocationError: the memory could not be had, or not be pinned.
    """

    def __init__(self, num_slots: int, slot_bytes: int, pinned: bool) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        size = num_slots * slot_bytes
        try:
            self._memory: mmap.mmap | None = mmap.mmap(-1, size)
        except (OSError, OverflowError, ValueError) as error:
            raise PoolAllocationError(_cannot("allocate", size, error)) from error
        with contextlib.suppress(OSError, AttributeError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.address = flat.data_ptr()
        self.bytes = flat.view(num_slots, slot_bytes)
        self._pinned = False
        if pinned:
            _touch(self.address, size)
            self._pin(size)

    def _pin(self, size: int) -> None:
        cudart = torch.cuda.cudart()
        status = cudart.cudaHostRegister(self.address, size, CUDA_HOST_REGISTER_PORTABLE_MAPPED)
        if int(status) != 0:
            raise PoolAllocationError(_cannot("pin", size, cudart.cudaGetErrorString(status)))
        self._pinned = True

    def close(self) -> None:
        """Unpin, and give the memory back with the last view of it. May be called twice.

        No transfer may be under way.
        """
        if self._memory is None:
            return
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.address)
        self.bytes = torch.empty((0, self.slot_bytes), dtype=torch.uint8)
        self._memory = None  # not closed: that would take it from under a view someone still holds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def free_memory_bytes() -> int:
    """RAM this process may still take: the machine's or its control group's, whichever is less."""
    available = _meminfo("MemAvailable")
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    if limit is None or used is None:
        return available
    reclaimable = _cgroup_stat("inactive_file")
    return min(available, limit - used + reclaimable)


def require_free_memory(ram_pool_gb: float, size: int, free: int | None = None) -> None:
    """Refuse a pool of `size` bytes that the machine, with `free` bytes, cannot hold.

    Raises:
        ConfigError: with the free memory in the message.
    """
    free = free_memory_bytes() if free is None else free
    if size > free:
        raise ConfigError(
            f"ram_pool_gb={ram_pool_gb:g}: this machine has {_gib(free)} GiB of free RAM; "
            f"use at most ram_pool_gb={_gib(free * 0.9)}"
        )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2g}"


def _touch(address: int, size: int) -> None:
    """Make the kernel hand out every page, on several threads (memset runs without the GIL)."""
    starts = range(0, size, TOUCH_BYTES)
    with ThreadPoolExecutor(min(TOUCH_THREADS, os.cpu_count() or 1)) as threads:
        for start in starts:
            threads.submit(ctypes.memset, address + start, 0, min(TOUCH_BYTES, size - start))


def _cannot(verb: str, size: int, reason: object) -> str:
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shown = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / GIB:.1f} GiB"
    return (
        f"cannot {verb} {size / GIB:.1f} GiB of host memory ({reason}): "
        f"{free_memory_bytes() / GIB:.1f} GiB are free, ulimit -l is {shown}; lower ram_pool_gb"
    )


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_number(name: str) -> int | None:
    """A number of this process's control group (version 2), None if unlimited or unknown."""
    try:
        return int((_cgroup_folder() / name).read_text())
    except (OSError, ValueError):
        return None


def _cgroup_stat(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in (_cgroup_folder() / "memory.stat").read_text().splitlines():
            if line.startswith(name + " "):
                return int(line.split()[1])
    return 0


def _cgroup_folder() -> Path:
    own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
    return Path("/sys/fs/cgroup") / own.lstrip("/")
