"""Leftovers: what of the caches under a disk_path could not be removed, by name, and why."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from kvortex.core import printable
from kvortex.disk.contents import why_unreadable, why_untried
from kvortex.disk.folder import LOCK, OWN_NAMES, is_held, namespaces, opened_folder, ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

FOREIGN = "is not KVortex's"


def leftovers(root: int) -> dict[str, str]:
    """Names below an open `disk_path`, and why each is there still.

    What gives no reason is tried once more, to have that of the system. To be asked while nobody
    else opens a cache.
    """
    found: dict[str, str] = {}
    for namespace in namespaces(root):
        found |= dict(_of_cache(root, namespace)) or _tried_again(root, namespace, namespace)
    return found


def shown(found: dict[str, str], most: int = 5) -> str:
    """The first of them, in one line."""
    told = [f"{printable(place)} {why}" for place, why in found.items()]
    more = [f"and {len(told) - most} more"] if len(told) > most else []
    return ", ".join(told[:most] + more)


def _of_cache(root: int, namespace: str) -> Iterator[tuple[str, str]]:
    try:
        with opened_folder(namespace, root) as above:
            ours = ranks(above)
            for name in _names(above):
                if name not in ours:
                    yield f"{namespace}/{name}", FOREIGN
            for rank in ours:
                yield from _of_rank(above, rank, f"{namespace}/{rank}")
    except OSError as error:
        yield namespace, why_unreadable(root, namespace, error)


def _of_rank(above: int, rank: str, place: str) -> Iterator[tuple[str, str]]:
    try:
        with opened_folder(rank, above) as folder:
            reasons = {f"{place}/{name}": _why(folder, name) for name in _names(folder)}
            told = {name: why for name, why in reasons.items() if why is not None}
            if not told and is_held(folder) is False:
                for name in OWN_NAMES:
                    told |= _tried_again(folder, name, f"{place}/{name}")
    except OSError as error:
        told = {place: why_unreadable(above, rank, error)}
    yield from (told or _tried_again(above, rank, place)).items()


def _names(folder: int) -> list[str]:
    return sorted(os.listdir(folder))


def _why(folder: int, name: str) -> str | None:
    """What is seen to keep a file where it is."""
    if name not in OWN_NAMES:
        return FOREIGN
    if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        return "is a folder"
    if name == LOCK:
        return "is held by a server" if is_held(folder) else why_untried(folder, name)
    return None


def _tried_again(folder: int, name: str, place: str) -> dict[str, str]:
    """Its name and what the system says; nothing if it is gone."""
    try:
        if name in OWN_NAMES:
            os.unlink(name, dir_fd=folder)
        else:
            os.rmdir(name, dir_fd=folder)
    except FileNotFoundError:
        return {}
    except OSError as error:
        return {place: f"cannot be removed: {error.strerror}"}
    return {}
