"""How much RAM this process may still take, by the machine and by its control group."""

from __future__ import annotations

import os
from pathlib import Path

from kvortex.config import GIB
from kvortex.control_group import limiting_groups
from kvortex.core import ConfigError


def free_memory_bytes() -> int:
    """RAM this process may still take: the machine's or a control group's, whichever is least."""
    return min([_meminfo("MemAvailable"), *(group.left for group in limiting_groups())])


def cgroup_limit_bytes() -> int | None:
    """What this process's control groups let it take, None if unlimited or unknown."""
    return min((group.limit for group in limiting_groups()), default=None)


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
