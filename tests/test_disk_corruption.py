"""10 000 ways to spoil a cache on disk: whatever is read under a key was written under it."""

from __future__ import annotations

import os
import random
import struct
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import pytest
from disks import KINDS, NAMESPACE, SECTOR, block_bytes, fill, is_whole, seal, verified_by
from xxhash import xxh3_64_intdigest

from kvortex.checksum import num_pieces
from kvortex.disk.checksums import Checksums
from kvortex.disk.format import NO_RECORD, RECORD_BYTES, Record, RecordFormat
from kvortex.disk.job import BlockRead, DiskJob
from kvortex.disk.moves import Moves
from kvortex.disk.slots import SlotFiles, Status
from kvortex.host_pool import HostPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Spoil = Callable[["Disk", random.Random], None]

CASES = dict.fromkeys(KINDS, 10000) | {"the GPU": 2_000}  # whose sums are slow on the CPU
SLOT_BYTES = 4096
KEYS = [b"key-%d" % number for number in range(5)]
NUM_SLOTS = len(KEYS) + 1  # one is empty


class Disk:
    """The bytes of the two files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = bytearray((folder / "records").read_bytes())
        self.slots = bytearray((folder / "slots").read_bytes())

    def save(self) -> None:
        (self.folder / "records").write_bytes(self.records)
        (self.folder / "slots").write_bytes(self.slots)


def record_format(rank: int = 0, slot_bytes: int = SLOT_BYTES) -> RecordFormat:
    return RecordFormat(NAMESPACE.digest(SLOT_BYTES), rank, slot_bytes)


@contextmanager
def opened(folder: Path) -> Iterator[SlotFiles]:
    fd = os.open(folder, os.O_RDONLY)
    try:
        with SlotFiles(fd, record_format(), NUM_SLOTS) as files:
            yield files
    finally:
        os.close(fd)


class Reader:
    """What reads blocks into a pool of one slot, where a load compares them."""

    def __init__(self, pool: HostPool, kind: str) -> None:
        self.kind = kind
        self.pool = pool
        self.memory = pool.bytes.view(-1).numpy().data
        self.verification = verified_by(kind, SLOT_BYTES)
        self.checksums = Checksums(pool, self.verification)
        self.left_to_loads = 0

    def write(self, files: SlotFiles, key: bytes, slot: int) -> None:
        fill(self.pool, 0, block_bytes(key, slot_bytes=SLOT_BYTES))
        seal(self.pool, 0, key, self.verification)
        files.write(slot, key, slot, self.memory, self.checksums.of(0, self.memory))

    def read(self, files: SlotFiles, key: bytes, slot: int) -> bytes | None:
        self.pool.bytes.fill_(0xEE)
        self.pool.checksums.fill_(0)
        job = DiskJob(1, [key], [slot], [0], 0.0, 1, [BlockRead.of(num_pieces(SLOT_BYTES))])
        moves = Moves(
            files, self.memory, self.checksums, {1: job}, Event(), lambda: True, lambda: None
        )
        if moves.read((1, 0, 0, 1, 1 << 62)) is not Status.DONE:
            return None
        if is_whole(self.pool, 0, key, self.verification):
            return self.memory.tobytes()
        self.left_to_loads += 1
        return None


@pytest.fixture(params=KINDS)
def reader(request: pytest.FixtureRequest) -> Iterator[Reader]:
    with HostPool(1, SLOT_BYTES, pinned=False) as pool:
        yield Reader(pool, request.param)


def flip_bits(disk: Disk, draw: random.Random) -> None:
    for _ in range(draw.choice([1, 1, 2, 50])):
        file = draw.choice([disk.records, disk.slots])
        file[draw.randrange(len(file))] ^= 1 << draw.randrange(8)


def tear_sectors(disk: Disk, draw: random.Random) -> None:
    file = draw.choice([disk.records, disk.slots])
    start = draw.randrange(len(file)) // SECTOR * SECTOR
    size = min(SECTOR, len(file) - start)
    file[start : start + size] = draw.choice([bytes(size), draw.randbytes(size)])


def swap_slots(disk: Disk, draw: random.Random) -> None:
    one, other = draw.sample(range(NUM_SLOTS), 2)
    swap(disk.slots, one, other, SLOT_BYTES)


def swap_records(disk: Disk, draw: random.Random) -> None:
    one, other = draw.sample(range(NUM_SLOTS), 2)
    swap(disk.records, one, other, RECORD_BYTES)


def swap_both(disk: Disk, draw: random.Random) -> None:
    one, other = draw.sample(range(NUM_SLOTS), 2)
    swap(disk.slots, one, other, SLOT_BYTES)
    swap(disk.records, one, other, RECORD_BYTES)


def cut_off(disk: Disk, draw: random.Random) -> None:
    file = draw.choice([disk.records, disk.slots])
    del file[draw.randrange(len(file)) :]


def plant_foreign_record(disk: Disk, draw: random.Random) -> None:
    """Of another rank, slot, size or age, whole in itself."""
    slot = draw.randrange(NUM_SLOTS)
    record = Record(draw.choice(KEYS), draw.choice([0, 9, 1 << 62, (1 << 64) - 1]), 5, 7)
    foreign = record_format(draw.choice([0, 1]), draw.choice([SLOT_BYTES, 1, (1 << 32) - 1]))
    packed = foreign.pack(draw.choice([slot, slot, 0, 1 << 63]), record)
    disk.records[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES] = packed


def plant_wild_lengths(disk: Disk, draw: random.Random) -> None:
    """In a record of ours, with a checksum that fits."""
    slot = draw.randrange(len(KEYS))
    start = slot * RECORD_BYTES
    offset = draw.choice([48, 52])
    struct.pack_into("<I", disk.records, start + offset, draw.choice([0, 65, 1 << 31, 0xFFFFFFFF]))
    fields = bytes(disk.records[start : start + RECORD_BYTES - 8])
    struct.pack_into("<Q", disk.records, start + RECORD_BYTES - 8, xxh3_64_intdigest(fields))


def swap(file: bytearray, one: int, other: int, size: int) -> None:
    a, b = slice(one * size, (one + 1) * size), slice(other * size, (other + 1) * size)
    file[a], file[b] = file[b], file[a]


SPOILS: list[Spoil] = [
    flip_bits,
    tear_sectors,
    swap_slots,
    swap_records,
    swap_both,
    cut_off,
    plant_foreign_record,
    plant_wild_lengths,
]


@pytest.fixture
def whole(tmp_path: Path, reader: Reader) -> Iterator[Path]:
    """A folder with a block of each key, in memory if there is such a file system."""
    shared = Path("/dev/shm")
    folder = shared / f"kvortex-{os.getpid()}" if shared.is_dir() else tmp_path / "cache"
    folder.mkdir()
    with opened(folder) as files:
        for slot, key in enumerate(KEYS):
            reader.write(files, key, slot)
    yield folder
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_nothing_but_what_was_written_is_read(whole: Path, reader: Reader) -> None:
    expected = {key: block_bytes(key, slot_bytes=SLOT_BYTES) for key in KEYS}
    pristine = Disk(whole)
    records, slots = bytes(pristine.records), bytes(pristine.slots)
    draw, misses = random.Random(6), dict.fromkeys(SPOILS, 0)
    for case in range(CASES[reader.kind]):
        spoil = SPOILS[case % len(SPOILS)]
        disk = pristine
        disk.records[:], disk.slots[:] = records, slots
        spoil(disk, draw)
        disk.save()
        with opened(whole) as files:
            for slot, key in enumerate(KEYS):
                found = reader.read(files, key, slot)
                assert found in {None, expected[key]}, (case, spoil)
                misses[spoil] += found is None
            for key, slot in zip(files.survivors.keys, files.survivors.slots, strict=True):
                found = reader.read(files, key, int(slot))
                assert found in {None, expected.get(key)}, (case, spoil)
            assert reader.read(files, KEYS[0], NUM_SLOTS - 1) in {None, expected[KEYS[0]]}
    assert all(misses.values()), misses  # every way to spoil does spoil something
    assert bool(reader.left_to_loads) is (reader.kind == "the GPU")


def test_a_pristine_cache_is_read_whole(whole: Path, reader: Reader) -> None:
    with opened(whole) as files:
        assert files.survivors.keys == KEYS
        assert files.survivors.invalid == 0
        for slot, key in enumerate(KEYS):
            assert reader.read(files, key, slot) == block_bytes(key, slot_bytes=SLOT_BYTES)


def test_what_cannot_be_a_record_is_counted(whole: Path) -> None:
    disk = Disk(whole)
    disk.records[:RECORD_BYTES] = os.urandom(RECORD_BYTES)
    disk.records[RECORD_BYTES : 2 * RECORD_BYTES] = NO_RECORD
    disk.records[3 * RECORD_BYTES + 60] ^= 1
    disk.records[5 * RECORD_BYTES :] = disk.records[2 * RECORD_BYTES : 3 * RECORD_BYTES]
    disk.save()
    with opened(whole) as files:
        assert files.survivors.invalid == 3
        assert files.survivors.slots.tolist() == [2, 4]
        there = [slot for slot, key in enumerate(KEYS) if files.checksum(slot, key) is not None]
        assert there == [2, 4]
