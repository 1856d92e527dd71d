"""Check of the drive under a disk_path: room, O_DIRECT and speed. Leaves nothing there."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kvortex.config import GIB
from kvortex.doctor.finding import Finding, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Move = Callable[[int, list[mmap.mmap], int], int]

SIZE = 256 << 20
CHUNK = 2 << 20
READERS, WRITERS = 8, 4
"""As many as the disk tier has, by default."""
SLOW_GB_S = 1.0
"""An 8B model's KV of 8K tokens is 1 GiB; most GPUs compute that in about a second."""
MOUNTS = Path("/proc/self/mountinfo")
NO_DRIVES = {"tmpfs", "ramfs", "nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "9p"}
UNSUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.EISDIR, errno.ENOSYS}


def check_drive(path: Path | None) -> Finding:
    """How fast blocks would come from there and go there."""
    if path is None:
        return Finding("disk", Verdict.UNSEEN, "not looked at; --disk-path PATH does")
    try:
        if not path.exists():
            return Finding("disk", Verdict.FAIL, f"{path} is no folder", f"mkdir -p {path}")
        return _measured(path)
    except OSError as error:
        advice = "name a folder of a local drive that you may write to"
        return Finding("disk", Verdict.FAIL, f"{path}: {error.strerror}", advice)


def _measured(path: Path) -> Finding:
    room = os.statvfs(path)
    free = room.f_bavail * room.f_frsize
    facts: dict[str, float | bool] = {"free_bytes": free}
    if free < 2 * SIZE:
        found = f"{path}: {free / GIB:.2g} GiB free"
        return Finding("disk", Verdict.FAIL, found, "make room, or name another drive", facts)
    with _nameless_file(path) as file:
        direct = _bypass_cache(file)
        os.posix_fallocate(file, 0, SIZE)
        write = _gb_s(file, WRITERS, os.pwritev)
        read = _gb_s(file, READERS, os.preadv)
    facts |= {"write_gb_s": write, "read_gb_s": read, "direct": direct}
    found = f"{path}: {free / GIB:.0f} GiB free, reads {read:.2g} GB/s, writes {write:.2g} GB/s"
    kind = _file_system(path)
    if kind in NO_DRIVES or not direct:
        lack = f"{kind} is no local drive" if kind in NO_DRIVES else f"no O_DIRECT on {kind}"
        return Finding("disk", Verdict.WARN, found, f"{lack}: take a folder of one", facts)
    if read < SLOW_GB_S:
        advice = "slow for KV blocks; those that take longer than to compute are not read"
        return Finding("disk", Verdict.WARN, found, advice, facts)
    return Finding("disk", Verdict.OK, found, facts=facts)


@contextmanager
def _nameless_file(folder: Path) -> Iterator[int]:
    """Open for reading and writing; gone however this process ends."""
    try:
        file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        file, name = tempfile.mkstemp(prefix=".kvortex-", dir=folder)
        os.unlink(name)  # noqa: PTH108  (a name as mkstemp gives it)
    try:
        yield file
    finally:
        os.close(file)


def _bypass_cache(file: int) -> bool:
    """Some file systems refuse O_DIRECT when it is set, others when it is used."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            os.pwritev(file, [page], 0)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        fcntl.fcntl(file, fcntl.F_SETFL, flags)
        return False
    return True


def _gb_s(file: int, count: int, move: Move) -> float:
    """Move the whole file by so many threads, and wait until the drive has it."""
    with ExitStack() as opened:
        memories = [opened.enter_context(mmap.mmap(-1, CHUNK)) for _ in range(count)]
        for memory in memories:
            memory[:] = os.urandom(CHUNK)  # drives and file systems may make light of zeros
        threads = opened.enter_context(ThreadPoolExecutor(count))
        began = time.perf_counter()
        parts = [
            threads.submit(_move_part, file, move, memory, range(CHUNK * i, SIZE, CHUNK * count))
            for i, memory in enumerate(memories)
        ]
        for part in parts:
            part.result()
        os.fdatasync(file)
        return SIZE / (time.perf_counter() - began) / 1e9


def _move_part(file: int, move: Move, memory: mmap.mmap, starts: range) -> None:
    for start in starts:
        if move(file, [memory], start) != CHUNK:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def _file_system(path: Path) -> str:
    """Kind of file system of a folder; empty where it is not told."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in MOUNTS.read_text().splitlines():
        mount, _, about = line.partition(" - ")
        if mount.split()[2] == number:
            return about.split()[0]
    return ""
