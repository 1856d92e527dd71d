"""Disk stores for tests: pools with known bytes, and files that fail when told to."""

from __future__ import annotations

import errno
import os
import random
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch

from kvortex.checksum import checksum_of, seed_of, signed
from kvortex.disk import DiskOptions, DiskStore, Namespace
from kvortex.disk.file import DiskFile
from kvortex.disk.folder import SLOTS
from kvortex.host_pool import HostPool
from kvortex.triton_kernels.reference import checksums_reference
from kvortex.verification import Verification

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvortex.core import BlockKey

NAMESPACE = Namespace(b"a model", {"model": "tiny", "dtype": "bfloat16"})
SLOT_BYTES = 8192
SECTOR = 512
KINDS = ("the disk", "the CPU", "the GPU")
"""Who counts the checksums of blocks."""


def verified_by(
    kind: str, slot_bytes: int = SLOT_BYTES, fingerprint: int = -1 << 62
) -> Verification | None:
    """How the pool's checksums are made, of each of KINDS."""
    if kind == "the disk":
        return None
    word = (slot_bytes | 8) & -(slot_bytes | 8)
    half = slot_bytes // word // 2 * word
    stretches = ((0, half), (half, slot_bytes - half))
    return Verification("always", fingerprint, kind == "the GPU", word, stretches)


def checksum(verification: Verification, key: BlockKey, data: bytes) -> int:
    """What is beside the slot of a key's bytes."""
    seed = seed_of(key) ^ verification.fingerprint
    if not verification.by_gpu:
        return signed(checksum_of(memoryview(data), seed))
    blocks = torch.frombuffer(bytearray(data), dtype=torch.uint8)[None]
    how = (verification.stretches, verification.word, torch.tensor([seed]))
    return int(checksums_reference(blocks, *how))


def block_bytes(key: BlockKey, version: int = 0, slot_bytes: int = SLOT_BYTES) -> bytes:
    """The bytes of a key, told by the key itself."""
    seed = blake2b(key + version.to_bytes(4, "big"), digest_size=8).digest()
    return random.Random(seed).randbytes(slot_bytes)


def fill(pool: HostPool, slot: int, data: bytes) -> None:
    pool.bytes[slot].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def seal(pool: HostPool, slot: int, key: BlockKey, verification: Verification | None) -> None:
    """Put the checksum of what is in a slot beside it."""
    if verification is not None:
        pool.checksums[slot] = checksum(verification, key, content(pool, slot))


def is_whole(pool: HostPool, slot: int, key: BlockKey, verification: Verification | None) -> bool:
    """Whether what a load compares agrees with what is in a slot."""
    if verification is None:
        return True
    return int(pool.checksums[slot]) == checksum(verification, key, content(pool, slot))


def content(pool: HostPool, slot: int) -> bytes:
    return pool.bytes[slot].numpy().tobytes()


@contextmanager
def opened(
    path: Path,
    num_slots: int = 8,
    *,
    namespace: Namespace = NAMESPACE,
    rank: int = 0,
    slot_bytes: int = SLOT_BYTES,
    verification: Verification | None = None,
    open_file: Any = DiskFile,
    **options: Any,
) -> Iterator[tuple[DiskStore, HostPool]]:
    """A store and the pool that it serves, of as many slots."""
    how = DiskOptions(
        **{"readers": 2, "writers": 2, "read_deadline_s": 10.0, "most_parts": 4} | options
    )
    with (
        HostPool(num_slots, slot_bytes, pinned=False, num_parts=3) as pool,
        DiskStore(path, namespace, rank, num_slots, pool, how, verification, open_file) as store,
    ):
        yield store, pool


def all_ended(store: DiskStore, *job_ids: int, timeout: float = 20) -> dict[int, frozenset[int]]:
    """Positions that failed of each job, when all have ended."""
    deadline, found = time.monotonic() + timeout, dict[int, frozenset[int]]()
    while set(job_ids) - set(found):
        assert time.monotonic() < deadline, f"of jobs {job_ids} only {set(found)} have ended"
        store.wait(0.05)
        found.update(store.poll().ended)
    return found


def ended(store: DiskStore, job_id: int) -> frozenset[int]:
    """Positions of a job that failed, when it has ended."""
    return all_ended(store, job_id)[job_id]


def written(
    store: DiskStore,
    pool: HostPool,
    blocks: dict[BlockKey, int],
    version: int = 0,
    verification: Verification | None = None,
) -> frozenset[int]:
    """Write the bytes of keys to the slots that they have; positions that failed."""
    for key, slot in blocks.items():
        fill(pool, slot, block_bytes(key, version, pool.slot_bytes))
        seal(pool, slot, key, verification)
    slots = list(blocks.values())
    store.write(1, list(blocks), slots, slots)
    return ended(store, 1)


def read(
    store: DiskStore,
    pool: HostPool,
    keys: Sequence[BlockKey],
    slots: Sequence[int],
    verification: Verification | None = None,
) -> list[bytes | None]:
    """Bytes of keys from disk slots; None is a miss, or what no load would take."""
    pool.bytes.fill_(0xEE)
    pool.checksums.fill_(0xEE)
    store.read(2, list(keys), list(slots), list(range(len(keys))))
    failed = set(ended(store, 2))
    for at in set(range(len(keys))) - failed:
        if not is_whole(pool, at, keys[at], verification):
            assert verification is not None
            assert verification.by_gpu  # else it was told
            failed.add(at)
    return [None if i in failed else content(pool, i) for i in range(len(keys))]


def _set(event: Event) -> Event:
    event.set()
    return event


@dataclass
class Faults:
    """What shall go wrong with the files that `open_file` opens, and what was written to them."""

    error: int | None = None
    """Number of the error that reads and writes meet."""
    writes_only: bool = False
    short: bool = False
    """Reads and writes move no more than half of what they could."""
    delay: float = 0.0
    flows: Event = field(default_factory=lambda: _set(Event()))
    """Cleared, reads and writes hang until it is set."""
    moves: int = 0
    """Reads and writes that began."""
    unsynced: list[tuple[str, int, bytes]] = field(default_factory=list)
    """File, offset and what was there before, of each write since the drive was told to keep it."""

    def open_file(self, folder: int, name: str, **how: Any) -> DiskFile:
        return FaultyFile(self, folder, name, **how)

    def cut_power(self, folder: Path, draw: random.Random) -> None:
        """Undo any sectors of what was not synced, in the files of a closed store."""
        for name, offset, before in reversed(self.unsynced):
            with (folder / name).open("r+b") as file:
                for start in range(0, len(before), SECTOR):
                    if draw.random() < 0.5:
                        file.seek(offset + start)
                        file.write(before[start : start + SECTOR])
        self.unsynced.clear()


class FaultyFile(DiskFile):
    """A file that fails as its faults say."""

    def __init__(self, faults: Faults, folder: int, name: str, **how: Any) -> None:
        self._faults = faults
        super().__init__(folder, name, **how)

    def sync(self) -> None:
        super().sync()
        self._faults.unsynced = [one for one in self._faults.unsynced if one[0] != self.name]

    def _preadv(self, memory: memoryview, offset: int) -> int:
        self._faults.moves += 1
        self._faults.flows.wait()
        time.sleep(self._faults.delay)
        error = self._faults.error  # which the test may mend meanwhile
        if error is not None and not self._faults.writes_only:
            raise OSError(error, os.strerror(error))
        return super()._preadv(self._shortened(memory), offset)

    def _pwritev(self, memory: memoryview | bytes, offset: int) -> int:
        self._faults.moves += 1
        self._faults.flows.wait()
        time.sleep(self._faults.delay)
        error = self._faults.error
        if error is not None:
            if error == errno.EIO and self.name == SLOTS:  # torn
                super()._pwritev(memory[: len(memory) // 2], offset)
            raise OSError(error, os.strerror(error))
        shortened = self._shortened(memory)
        with Path(f"/proc/self/fd/{self._fd}").open("rb") as cached:
            before = os.pread(cached.fileno(), len(shortened), offset)
        self._faults.unsynced.append((self.name, offset, before))
        return super()._pwritev(shortened, offset)

    def _shortened(self, memory: Any) -> Any:
        if not self._faults.short or len(memory) <= 1:
            return memory
        half = len(memory) // 2
        return memory[: half // 4096 * 4096 or len(memory)] if self.direct else memory[:half]
