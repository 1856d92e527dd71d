"""Control group: what the kernel lets this process and its neighbours take of RAM. Linux."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
"""Version 1 has a number near 2**63 for it."""


@dataclass(frozen=True, slots=True)
class _Names:
    """Of the files of one version."""

    limit: str
    used: str
    reclaimable: str
    """The line of memory.stat that tells how much of what is used can be given up."""


V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = _Names("memory.max", "memory.current", "inactive_file")


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """One that limits memory: bytes that may be used, and bytes that are left of them."""

    limit: int
    left: int


def limiting_groups() -> list[ControlGroup]:
    """Of this process: its own and those around it, of both versions, as far as they are seen."""
    return [group for folder, names in _folders() if (group := _read(folder, names)) is not None]


def _folders() -> Iterator[tuple[Path, _Names]]:
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else ():
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            yield from ((folder, V2) for folder in _upwards(MOUNT, own))
        elif "memory" in controllers.split(","):
            yield from ((folder, V1) for folder in _upwards(MOUNT / "memory", own))


def _upwards(mount: Path, own: str) -> list[Path]:
    """A group's folder and those around it. In a container its path may be one of the host, and
    the mount then is the group itself."""
    folder = mount / own.lstrip("/")
    return [above for above in (folder, *folder.parents) if above.is_relative_to(mount)]


def _read(folder: Path, names: _Names) -> ControlGroup | None:
    """None where it has no limit, or is not to be seen."""
    try:
        limit = int((folder / names.limit).read_text())
        used = int((folder / names.used).read_text())
    except (OSError, ValueError):  # "max" is no number
        return None
    if limit >= UNLIMITED:
        return None
    return ControlGroup(limit, limit - used + _stat(folder, names.reclaimable))


def _stat(folder: Path, name: str) -> int:
    with contextlib.suppress(OSError):
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith(name + " "):
                return int(line.split()[1])
    return 0
