"""Doubts about a configuration: what a server that starts on this machine would refuse or warn of.

Nothing is written and no pool is opened, so that it can be asked before there is a server.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvortex.config import GIB
from kvortex.core import ConfigError
from kvortex.free_memory import require_free_memory
from kvortex.numa import require_node

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvortex.config import KVortexConfig


def doubts(config: KVortexConfig) -> list[str]:
    """Each in a line, with what to write instead; none where this machine will do."""
    told = []
    for check in _checks():
        try:
            check(config)
        except ConfigError as error:
            told.append(str(error))
    return told + [doubt for doubt in (small_disk(config),) if doubt is not None]


def require_this_machine(config: KVortexConfig) -> None:
    """Before minutes of work for which servers are started here.

    Raises:
        ConfigError: the first thing that one of them would refuse.
    """
    for check in _checks():
        check(config)


def small_disk(config: KVortexConfig) -> str | None:
    """What is to be said of a disk that holds no more than RAM does."""
    disk, ram = config.disk_pool_gb, config.ram_pool_gb
    if disk is None or disk > ram:
        return None
    return (
        f"disk_pool_gb={disk:g} is not more than ram_pool_gb={ram:g}: the disk has what RAM has, "
        "and serves after a restart only."
    )


def _checks() -> tuple[Callable[[KVortexConfig], None], ...]:
    return (_memory, _node, _trace, _disk)


def _memory(config: KVortexConfig) -> None:
    require_free_memory(config.ram_pool_gb, config.ram_pool_bytes)


def _node(config: KVortexConfig) -> None:
    require_node(config.numa_node)


def _trace(config: KVortexConfig) -> None:
    if config.trace_path is None:
        return
    path = Path(config.trace_path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        lack = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigError(f"trace_path={config.trace_path!r}: {lack}; name a file in one")
    there = path if path.exists() else path.absolute().parent
    if not os.access(there, os.W_OK):
        raise ConfigError(f"trace_path={config.trace_path!r}: {there} may not be written")


def _disk(config: KVortexConfig) -> None:
    """The folder, or the one in which it will be made, and the room in it."""
    if config.disk_path is None or config.disk_pool_gb is None:
        return
    path = Path(config.disk_path).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    told = f"disk_path={config.disk_path!r}: "
    if not there.is_dir():
        raise ConfigError(f"{told}{there} is no folder; name one on a local drive")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{told}{there} may not be written; name a folder of your own")
    room = os.statvfs(there)
    free = room.f_bavail * room.f_frsize + _own_bytes(path)
    if config.disk_pool_gb * GIB > free:
        raise ConfigError(
            f"{told}{free / GIB:.2f} GiB are free there, and disk_pool_gb is "
            f"{config.disk_pool_gb:g} GiB; lower disk_pool_gb"
        )


def _own_bytes(disk_path: Path) -> int:
    """What caches of before hold, which a server takes over or removes."""
    files = disk_path.glob("*/rank-*/*")
    return sum(file.lstat().st_blocks * 512 for file in files if file.exists())
