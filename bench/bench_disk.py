"""What the disk store reaches of a drive, and what it costs, beside fio and a bare read.

    python bench/bench_disk.py /mnt/nvme --commit $(git rev-parse --short HEAD)

Appends rows to bench/results/disk.csv. fio writes and reads a file of the same size with O_DIRECT
at the same depth, in turns with ours; its best way counts. Its buffers are on huge pages, as the
host pool is: with small ones a block is many pieces of memory to the drive, and fio reaches about
half as much (the rows "4 KiB pages" say how much). Count rows of a quiet machine only: their `load`
tells.

Ours is measured as it is in service: "kvortex" beside a GPU, which counts and compares checksums
itself, so that the disk's threads hash nothing; "kvortex, CPU" without one, where they hash what is
read. On the way out nobody hashes in either.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import torch
from results import append
from xxhash import xxh3_64_intdigest

from kvortex.checksum import checksum_of, num_pieces, seed_of, signed
from kvortex.disk import DiskOptions, DiskStore, Namespace
from kvortex.disk.checksums import scheme_of
from kvortex.disk.file import DiskFile
from kvortex.disk.format import Record, RecordFormat
from kvortex.host_pool import HostPool
from kvortex.verification import Verification

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Has fio's buffers advised to be huge, as the pool's memory is; glibc knows it since 2.35."""
FIO = {
    "fio libaio": (["--ioengine=libaio", "--iodepth={depth}"], HUGE_PAGES),
    "fio io_uring": (["--ioengine=io_uring", "--iodepth={depth}"], HUGE_PAGES),
    "fio threads": (["--ioengine=psync", "--thread", "--numjobs={depth}"], HUGE_PAGES),
    "fio libaio, 4 KiB pages": (["--ioengine=libaio", "--iodepth={depth}"], {}),
}
"""Ways, each with its arguments and environment; as many threads as ours has is one of them."""
OURS = {"kvortex": True, "kvortex, CPU": False}
"""Paths, and whether a GPU counts the checksums."""
NAMESPACE = Namespace(b"bench", {"bench": "disk"})
STEP_S = 0.005
"""Between two polls where CPU time is measured: a step of an engine."""
INDEXED_BYTES = 100 * 10**9


def verification(slot_bytes: int, *, by_gpu: bool) -> Verification:
    return Verification("always", 1, by_gpu, 8, ((0, slot_bytes),))


def seal(pool: HostPool, keys: Sequence[bytes]) -> None:
    """Put beside each slot what the CPU compares; no GPU is there to mind."""
    memory, size = pool.bytes.view(-1).numpy().data, pool.slot_bytes
    fingerprint = verification(size, by_gpu=False).fingerprint
    for slot, key in enumerate(keys):
        block = memory[slot * size : (slot + 1) * size]
        pool.checksums[slot] = signed(checksum_of(block, seed_of(key) ^ fingerprint))


@dataclass(frozen=True)
class Setup:
    """The stores under test, by path, and where fio works beside them."""

    stores: dict[str, DiskStore]
    pool: HostPool
    folder: Path
    depth: int

    @property
    def keys(self) -> list[bytes]:
        return [b"%032d" % number for number in range(self.pool.num_slots)]

    @property
    def slots_file(self) -> Path:
        """Of any of the stores."""
        return next(self.folder.rglob("slots"))


def wait_for(store: DiskStore, job: int, pause: float = 0) -> None:
    while True:
        if job in (ended := store.poll().ended):
            if ended[job]:
                raise SystemExit(f"{len(ended[job])} blocks failed: {store.counters}")
            return
        if pause:
            time.sleep(pause)
        else:
            store.wait(1)


def moved(setup: Setup, path: str, verb: str, pause: float = 0) -> tuple[float, float]:
    """Seconds, and seconds of CPU, to move the whole pool."""
    slots, store = list(range(setup.pool.num_slots)), setup.stores[path]
    keys = setup.keys
    cpu, start = time.process_time(), time.perf_counter()
    (store.write if verb == "write" else store.read)(1, keys, slots, slots)
    wait_for(store, 1, pause)
    return time.perf_counter() - start, time.process_time() - cpu


def fio(setup: Setup, verb: str, way: str) -> float | None:
    """GB/s, or None where fio has no such engine."""
    arguments, environment = FIO[way]
    size = setup.pool.num_slots * setup.pool.slot_bytes
    jobs = setup.depth if "threads" in way else 1
    command = [
        "fio",
        "--name=bench",
        f"--filename={setup.folder / 'fio'}",
        f"--filesize={size}",
        f"--size={size // jobs}",
        f"--offset_increment={size // jobs}",
        f"--bs={setup.pool.slot_bytes}",
        "--iomem_align=2m",
        f"--rw={verb}",
        "--direct=1",
        "--scramble_buffers=0",
        "--group_reporting",
        "--output-format=json",
        *(argument.format(depth=setup.depth) for argument in arguments),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )
    if done.returncode:
        return None
    return float(json.loads(done.stdout)["jobs"][0][verb]["bw_bytes"]) / 1e9


def bandwidth(setup: Setup, rounds: int) -> list[dict[str, Any]]:
    """Each round in an order drawn anew; the first, which lays the files out, is left out."""
    took: dict[tuple[str, str], list[float]] = {}
    size, draw = setup.pool.num_slots * setup.pool.slot_bytes, random.Random(0)
    for number in range(rounds + 1):
        for verb in ("write", "read"):
            for path in draw.sample([*OURS, *FIO], len(OURS) + len(FIO)):
                ours = path in OURS
                speed = size / moved(setup, path, verb)[0] / 1e9 if ours else fio(setup, verb, path)
                if number and speed is not None:
                    took.setdefault((verb, path), []).append(speed)
    return [row(f"{verb} bandwidth", path, "GB/s", s) for (verb, path), s in took.items()]


def cpu(setup: Setup, rounds: int) -> list[dict[str, Any]]:
    """Of a block, all threads together, polled once a step; and of what cannot be done without."""
    blocks = setup.pool.num_slots
    took: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for verb in ("write", "read"):
            for path, spent in (
                *((path, moved(setup, path, verb, STEP_S)[1]) for path in OURS),
                (f"bare p{verb}v", bare_cpu(setup, verb, hashes=False)),
                (f"bare p{verb}v and xxh3", bare_cpu(setup, verb, hashes=True)),
            ):
                took.setdefault((verb, path), []).append(spent / blocks * 1e6)
    return [row(f"{verb} CPU of a block", path, "us", s) for (verb, path), s in took.items()]


def bare_cpu(setup: Setup, verb: str, *, hashes: bool) -> float:
    """Seconds of CPU that one thread takes to move the whole pool, and to checksum it."""
    size = setup.pool.slot_bytes
    memory = setup.pool.bytes.view(-1).numpy().data
    fd = os.open(setup.slots_file, os.O_RDWR | os.O_DIRECT)
    move = os.pwritev if verb == "write" else os.preadv
    start = time.process_time()
    for slot in range(setup.pool.num_slots):
        block = memory[slot * size : (slot + 1) * size]
        move(fd, [block], slot * size)
        if hashes:
            xxh3_64_intdigest(block)
    spent = time.process_time() - start
    os.close(fd)
    return spent


def latency(setup: Setup, samples: int) -> list[dict[str, Any]]:
    """Of one block, by a bare read and by the store in turns, of slots drawn anew.

    Where the CPU compares, the store reads it in one part or in several, by as many threads.
    """
    draw, size, keys = random.Random(0), setup.pool.slot_bytes, setup.keys
    memory = setup.pool.bytes.view(-1).numpy().data
    pieces = num_pieces(size)
    ways = {
        f"{path}, {n} part(s)": (setup.stores[path], n)
        for path, by_gpu in OURS.items()
        for n in ((1,) if by_gpu else (1, 2, 4))
        if n <= min(pieces, setup.depth)
    }
    took: dict[str, list[float]] = {path: [] for path in ("bare pread", *ways)}
    fd = os.open(setup.slots_file, os.O_RDONLY | os.O_DIRECT)
    try:
        for number in range(samples):
            for path in draw.sample([*took], len(took)):
                slot = draw.randrange(setup.pool.num_slots)
                start = time.perf_counter()
                if path in ways:
                    store, parts = ways[path]
                    store._most_parts = parts
                    store.read(number, [keys[slot]], [slot], [slot])
                    wait_for(store, number)
                else:
                    os.preadv(fd, [memory[slot * size : (slot + 1) * size]], slot * size)
                took[path].append((time.perf_counter() - start) * 1e6)
    finally:
        os.close(fd)
    return [row("latency of a block", path, "us", times) for path, times in took.items()]


class Sparse(DiskFile):
    """Sets nothing aside: the table is what is measured."""

    def allocate(self, size: int) -> bool:
        os.ftruncate(self._fd, size)
        return True


def opening(folder: Path, slot_bytes: int, rounds: int) -> list[dict[str, Any]]:
    """Of a store of 100 GB whose every slot holds a block, its table not in the page cache."""
    num_slots = INDEXED_BYTES // slot_bytes
    times = []
    with HostPool(1, slot_bytes, pinned=False) as pool:
        how = verification(slot_bytes, by_gpu=True)
        place = (folder / "index", NAMESPACE, 0, num_slots, pool, DiskOptions(), how, Sparse)
        DiskStore(*place).close()
        table = next((folder / "index").rglob("records"))
        record_format = RecordFormat(NAMESPACE.digest(slot_bytes, scheme_of(how)), 0, slot_bytes)
        with table.open("r+b") as file:
            for slot in range(num_slots):
                record = Record(b"%032d" % slot, slot + 1, slot, 1)
                file.write(record_format.pack(slot, record))
        for _ in range(rounds):
            drop(table)
            start = time.perf_counter()
            with DiskStore(*place) as store:
                times.append((time.perf_counter() - start) * 1e3)
                if len(store.survivors.keys) != num_slots:
                    raise SystemExit("the table was not read whole")
    return [row("opening of 100 GB", "kvortex", "ms", times)]


def drop(path: Path) -> None:
    """Out of the page cache."""
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def row(what: str, path: str, unit: str, values: Sequence[float]) -> dict[str, Any]:
    cuts = quantiles(values, n=10)
    shown = {f"p{p}": round(cuts[p // 10 - 1], 3) for p in (20, 50, 80)}
    return {"what": what, "path": path, "unit": unit, "samples": len(values), **shown}


def drive(folder: Path) -> str:
    """Model of the drive, and the file system on it."""
    number = folder.stat().st_dev
    system = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    found = subprocess.run(
        ["findmnt", "-no", "FSTYPE", "-T", str(folder)], capture_output=True, text=True, check=False
    )
    for place in (system, system.parent):
        if (place / "device" / "model").exists():
            return f"{(place / 'device' / 'model').read_text().strip()} {found.stdout.strip()}"
    return f"{system.name} {found.stdout.strip()}"


def fio_version() -> str:
    return subprocess.check_output(["fio", "--version"], text=True).strip()


def facts(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "device": drive(args.folder),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "xxhash": version("xxhash"),
        "fio": fio_version() if shutil.which("fio") else "",
        "block_bytes": args.block_bytes,
        "blocks": args.blocks,
        "depth": args.depth,
    }


def measured(setup: Setup, args: argparse.Namespace) -> list[Callable[[], list[dict[str, Any]]]]:
    return [
        lambda: bandwidth(setup, args.rounds),
        lambda: cpu(setup, args.rounds),
        lambda: latency(setup, args.samples),
        lambda: opening(setup.folder, args.block_bytes, args.rounds),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="on the drive; a folder is made in it, and removed"
    )
    parser.add_argument("--block-bytes", type=int, default=2 << 20)
    parser.add_argument("--blocks", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--commit", default="", help="commit under test")
    parser.add_argument("--out", type=Path, default=Path("bench/results/disk.csv"))
    args = parser.parse_args()
    about, work = facts(args), args.folder / "kvortex-bench"
    options = DiskOptions(read_deadline_s=60, readers=args.depth, writers=args.depth)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        pool = stack.enter_context(HostPool(args.blocks, args.block_bytes, pinned=False))
        pool.bytes.random_(0, 256)
        expected = pool.bytes.clone()

        def store(*, by_gpu: bool) -> DiskStore:
            how = verification(args.block_bytes, by_gpu=by_gpu)
            return DiskStore(work / "store", NAMESPACE, 0, args.blocks, pool, options, how)

        stores = {path: stack.enter_context(store(by_gpu=by_gpu)) for path, by_gpu in OURS.items()}
        setup = Setup(stores, pool, work, args.depth)
        seal(pool, setup.keys)
        for measure in measured(setup, args):
            for found in measure():
                append(args.out, about | found)
                print(*found.values(), flush=True)
        if not torch.equal(pool.bytes, expected):
            raise SystemExit("what was read is not what was written: none of these figures count")


if __name__ == "__main__":
    main()
