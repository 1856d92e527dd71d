"""Neighbours: caches of other namespaces under one disk_path, and how they make room for ours."""

from __future__ import annotations

import contextlib
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvortex.core import ConfigError
from kvortex.disk.folder import LOCK, OWN_NAMES, held, namespaces, opened_folder, ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

SPARE_SHARE = 0.1
"""Of the file system stays free, or no cache of another model stays: they must not fill a disk that
others write to."""


class Neighbours:
    """They stay as long as there is room; those that were not used for longest go first, and those
    that a server holds not at all. To be used while nobody else opens a cache.

    Args:
        root: descriptor of the `disk_path`.
        own: name of the namespace that stays in any case.
    """

    def __init__(self, root: int, own: str) -> None:
        self.removed = 0
        self._root = root
        self._left = self._by_last_use(own)

    def make_room(self) -> bool:
        """Remove one; False if there is none that may go."""
        for name in self._left:
            if removed(self._root, name):
                self.removed += 1
                return True
        return False

    def leave_spare(self) -> None:
        """Remove some until the file system has a share of itself free."""
        while _free_share(self._root) < SPARE_SHARE and self.make_room():
            pass

    def leave(self) -> None:
        """Remove all."""
        while self.make_room():
            pass

    def _by_last_use(self, own: str) -> Iterator[str]:
        others = [name for name in namespaces(self._root) if name != own]
        return iter(sorted(others, key=lambda name: _last_use(self._root, name)))


def remove_idle(root: int) -> int:
    """Remove the caches under an open `disk_path` that no server holds; returns how many."""
    return sum(removed(root, name) for name in namespaces(root))


def removed(root: int, name: str) -> bool:
    """Remove a cache with all its ranks if nobody holds one; what is not ours in it stays, with the
    folders around it. Returns whether it made any room."""
    made_room = False
    try:
        with opened_folder(name, root) as namespace, ExitStack() as stack:
            found = ranks(namespace)
            folders = [stack.enter_context(opened_folder(rank, namespace)) for rank in found]
            for folder in folders:
                stack.enter_context(held(folder, LOCK))
            for rank, folder in zip(found, folders, strict=True):
                for own in OWN_NAMES:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(own, dir_fd=folder)
                        made_room = made_room or own != LOCK  # which `held` may have made
                with contextlib.suppress(OSError):  # a foreign file is there, too
                    os.rmdir(rank, dir_fd=namespace)
        os.rmdir(name, dir_fd=root)
    except (OSError, ConfigError):
        return made_room
    return True


def _last_use(root: int, name: str) -> float:
    """When a file in it was last written: a server does so at its start, and while it serves."""
    latest = 0.0
    with contextlib.suppress(OSError), opened_folder(name, root) as namespace:
        for rank in ranks(namespace):
            with opened_folder(rank, namespace) as folder:
                for own in OWN_NAMES:
                    with contextlib.suppress(FileNotFoundError):
                        found = os.stat(own, dir_fd=folder, follow_symlinks=False)
                        latest = max(latest, found.st_mtime)
    return latest


def _free_share(root: int) -> float:
    of = os.fstatvfs(root)
    return of.f_bavail / max(1, of.f_blocks)
