"""How much RAM this process may still take, by the machine and by its control group."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from kvortex.config import GIB
from kvortex.core import ConfigError


def free_memory_bytes() -> int:
    """RAM this process may still take: the machine's or its control group's, whichever is less."""
    available = _meminfo("MemAvailable")
    limit, used = cgroup_limit_bytes(), _cgroup_number("memory.current")
    if limit is None or used is None:
        return available
    reclaimable = _cgroup_stat("inactive_file")
    return min(available, limit - used + reclaimable)


def cgroup_limit_bytes() -> int | None:
    """What this process's control group (version 2) may take, None if unlimited or unknown."""
    return _cgroup_number("memory.max")


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
