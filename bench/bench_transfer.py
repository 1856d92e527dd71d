"""How fast blocks move between a GPU and host memory, by every path there is, in one run.

    python bench/bench_transfer.py --commit $(git rev-parse --short HEAD)

Appends rows to bench/results/transfer.csv and draws bench/results/transfer.png. Bandwidth is of
1 GiB of scattered blocks of 32 layers, as a share of plain memcpys of 1 GiB in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from results import append, machine

from kvortex.calibration import DMA, STAGED, ZERO_COPY
from kvortex.copy_engine import Ticket
from kvortex.core import Direction
from kvortex.cuda_copy_engine import CudaCopyEngine
from kvortex.cuda_driver import cuda_driver
from kvortex.cuda_ticket import CudaTicket, EventPool
from kvortex.movers.factory import BUFFER_BYTES, STAGED_PROGRAMS
from kvortex.tune import Rig, median_seconds, rig
from kvortex.verification import verification_of

if TYPE_CHECKING:
    from collections.abc import Callable

STORE, LOAD = Direction.STORE, Direction.LOAD
PAGES = (4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 256 << 10, 2 << 20)
GIB = 1 << 30
SLOW_PATH_BYTES = 64 << 20
STORED_BESIDE = 4 * GIB
CHOSEN = "kvortex"


@dataclass
class Report:
    """Rows, printed as they come."""

    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        what: str,
        path: str,
        direction: str,
        page: int,
        value: float,
        unit: str,
        share: float | None = None,
    ) -> None:
        row = {
            "what": what, "path": path, "direction": direction, "page_bytes": page,
            "value": float(f"{value:.4g}"), "unit": unit,
            "of_memcpy": None if share is None else round(share, 4),
        }  # fmt: skip
        self.rows.append(row)
        shown = "" if share is None else f"{share:8.3f}"
        print(
            f"{what:22} {path:20} {direction:5} {page >> 10:>5} KiB {value:10.4g} {unit:8}{shown}",
            flush=True,
        )


class Memcpy:
    """The floor: one contiguous copy each way."""

    def __init__(self, device: torch.device) -> None:
        self.host = torch.empty(2 * GIB, dtype=torch.uint8, pin_memory=True)
        self.gpu = torch.empty(2 * GIB, dtype=torch.uint8, device=device)
        self.streams = {way: torch.cuda.Stream(device) for way in Direction}

    def start(self, way: Direction, nbytes: int = GIB) -> None:
        part = slice(0, nbytes) if way is STORE else slice(GIB, GIB + nbytes)
        there, here = (self.host, self.gpu) if way is STORE else (self.gpu, self.host)
        with torch.cuda.stream(self.streams[way]):
            there[part].copy_(here[part], non_blocking=True)

    def both(self) -> None:
        self.start(STORE)
        self.start(LOAD)


def until_done(work: Callable[[], Ticket], rounds: int = 5) -> float:
    """Median seconds until a ticket is done; the thread that submits is not seen by CUDA."""

    def wait() -> None:
        ticket = work()
        while not ticket.done:
            pass

    return median_seconds(wait, rounds)


def page_loop(rig_: Rig, way: Direction, count: int) -> None:
    """What a first version writes: one asynchronous torch copy for each page."""
    for block, slot in zip(
        rig_.block_ids[:count].tolist(), rig_.slots[:count].tolist(), strict=True
    ):
        for page in rig_.layout.pages:
            on_host = rig_.pool.bytes[slot, page.slot_offset : page.slot_offset + page.nbytes]
            on_gpu = page.view[block].view(-1)
            if way is STORE:
                on_host.copy_(on_gpu, non_blocking=True)
            else:
                on_gpu.copy_(on_host, non_blocking=True)


def pointers(rig_: Rig, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Address on the GPU, address on the host and bytes of every page of `count` blocks."""
    base, stride, offset, size = rig_.layout.run_table().numpy().T
    gpu = base + rig_.block_ids[:count, None] * stride
    host = rig_.pool.bytes.data_ptr() + rig_.slots[:count, None] * rig_.pool.slot_bytes + offset
    sizes = np.broadcast_to(size, gpu.shape)
    return tuple(np.ascontiguousarray(a, np.uint64).ravel() for a in (gpu, host, sizes))  # type: ignore[return-value]


def driver_batch(rig_: Rig, way: Direction, count: int, stream: int) -> None:
    gpu, host, sizes = pointers(rig_, count)
    there, here = (host, gpu) if way is STORE else (gpu, host)
    cuda_driver().copy_batch(there, here, sizes, stream)


def driver_loop(rig_: Rig, way: Direction, count: int, stream: int) -> None:
    gpu, host, sizes = (a.tolist() for a in pointers(rig_, count))
    there, here = (host, gpu) if way is STORE else (gpu, host)
    copy = cuda_driver().copy
    for to, source, nbytes in zip(there, here, sizes, strict=True):
        copy(to, source, nbytes, stream)


def vllm_batch() -> Callable[..., None] | None:
    """vLLM's own copy of many blocks, where it is installed."""
    try:
        from vllm import _custom_ops as ops

        ops.swap_blocks_batch  # noqa: B018
    except (ImportError, AttributeError):
        return None

    stream = torch.cuda.Stream()

    def copy(rig_: Rig, way: Direction, count: int) -> None:
        gpu, host, sizes = (torch.from_numpy(a.astype(np.int64)) for a in pointers(rig_, count))
        there, here = (host, gpu) if way is STORE else (gpu, host)
        with torch.cuda.stream(stream):  # the call refuses the default one
            ops.swap_blocks_batch(here, there, sizes)

    return copy


def bandwidth(report: Report, memcpy: dict[str, float], device: torch.device, page: int) -> None:
    """Every path, each direction, one page size."""
    with rig(device, page, GIB) as machine_:
        few = max(1, SLOW_PATH_BYTES // machine_.pool.slot_bytes)
        stream = torch.cuda.Stream().cuda_stream
        block_bytes = machine_.pool.slot_bytes
        theirs = vllm_batch()
        for way in Direction:
            paths: dict[str, tuple[Callable[[], object], int]] = {
                "torch copy loop": (
                    partial(page_loop, machine_, way, few // 4 or 1),
                    few // 4 or 1,
                ),
                "cuMemcpyAsync loop": (partial(driver_loop, machine_, way, few, stream), few),
                "cuMemcpyBatchAsync": (
                    partial(driver_batch, machine_, way, few * 4, stream),
                    few * 4,
                ),
            }
            if theirs is not None:
                paths["vllm swap_blocks"] = (partial(theirs, machine_, way, few * 4), few * 4)
            for mover in (ZERO_COPY, STAGED, DMA):
                lane = machine_.lane(way, mover, 8)
                count = few * 4 if mover == DMA else machine_.num_blocks
                if mover in lane.movers:
                    paths[f"{CHOSEN} {mover}"] = (partial(machine_.start, lane, count), count)
            for path, (work, count) in paths.items():
                speed = min(count, machine_.num_blocks) * block_bytes / median_seconds(work, 3)
                report.add(
                    "bandwidth",
                    path,
                    way.value,
                    page,
                    speed / 1e9,
                    "GB/s",
                    speed / memcpy[way.value],
                )
        as_calibrated(report, memcpy, machine_, page)


def as_calibrated(report: Report, memcpy: dict[str, float], machine_: Rig, page: int) -> None:
    """The engine with its own choice: 1 GiB and 64 MiB, each way and both ways at once."""
    engine = CudaCopyEngine(
        machine_.layout, machine_.pool, 4, verification_of(machine_.layout, "always")
    )
    ids, slots, half = machine_.block_ids, machine_.slots, machine_.num_blocks // 2
    few = max(1, SLOW_PATH_BYTES // machine_.pool.slot_bytes)
    scattered = np.random.default_rng(1).permutation(machine_.num_blocks)
    for way in Direction:
        for what, a, b in (
            ("bandwidth", ids, slots),
            ("bandwidth 64 MiB", ids[:few], slots[:few]),
            ("bandwidth, far slots", ids, scattered),
        ):
            seconds = until_done(partial(engine.copy, way, a, b), 9)
            speed = len(a) * machine_.pool.slot_bytes / seconds
            plain = memcpy[f"{way.value} 64 MiB" if a is not ids else way.value]
            report.add(what, CHOSEN, way.value, page, speed / 1e9, "GB/s", speed / plain)

    def both() -> None:
        tickets = [
            engine.copy(STORE, ids[:half], slots[:half]),
            engine.copy(LOAD, ids[half:], slots[half:]),
        ]
        while not all(ticket.done for ticket in tickets):
            pass

    speed = machine_.nbytes / median_seconds(both)
    report.add("bandwidth", CHOSEN, "both", page, speed / 1e9, "GB/s", speed / memcpy["both"])
    layers = until_done(lambda: engine.load_layers(ids, slots)[-1])
    lane = machine_.lane(LOAD, ZERO_COPY, 8)
    launches: dict[str, Callable[[], Ticket]] = {
        CHOSEN: partial(engine.copy, LOAD, ids, slots),
        f"{CHOSEN} {ZERO_COPY}": partial(machine_.start, lane),
    }
    for path, launch in launches.items():
        ratio = until_done(launch) / layers
        report.add("layers against whole", path, "load", page, ratio, "ratio")
    check_bytes(machine_, engine)
    engine.close()


def check_bytes(machine_: Rig, engine: CudaCopyEngine) -> None:
    """Nothing is reported that did not move the right bytes."""
    ids, slots = machine_.block_ids, machine_.slots
    before = {name: kv.clone() for name, kv in machine_.kv_caches.items()}
    machine_.pool.bytes.fill_(0xEE)
    engine.copy(STORE, ids, slots).wait()
    for page in machine_.layout.pages:
        part = slice(page.slot_offset, page.slot_offset + page.nbytes)
        assert torch.equal(machine_.pool.bytes[slots, part], before[page.name][ids].cpu())
    for kv in machine_.kv_caches.values():
        kv.fill_(0xDD)
    engine.copy(LOAD, ids, slots).wait()
    assert all(torch.equal(kv, before[name]) for name, kv in machine_.kv_caches.items())


def programs(report: Report, memcpy: dict[str, float], device: torch.device) -> None:
    """How much of the link zero-copy fills with how large a grid."""
    for page in (4 << 10, 16 << 10, 64 << 10):
        with rig(device, page, GIB // 2) as machine_:
            for way in Direction:
                for grid in (1, 2, 4, 8, 16, 32):
                    lane = machine_.lane(way, ZERO_COPY, grid)
                    speed = machine_.nbytes / median_seconds(partial(machine_.start, lane), 3)
                    report.add(
                        f"bandwidth, {grid} programs", f"{CHOSEN} {ZERO_COPY}", way.value, page,
                        speed / 1e9, "GB/s", speed / memcpy[way.value],
                    )  # fmt: skip


def host_costs(report: Report, device: torch.device) -> None:
    """CPU time of submissions, beside that of the driver calls they cannot do without."""
    for page in (4 << 10, 64 << 10):  # blocks of 128 KiB and of 2 MiB
        with rig(device, page, page * 32 * 2048) as machine_:
            engine = CudaCopyEngine(
                machine_.layout, machine_.pool, 4, verification_of(machine_.layout, "always")
            )
            ids, slots = machine_.block_ids, machine_.slots
            for way in Direction:
                one = timed_calls(partial(engine.copy, way, ids[:1], slots[:1]), 500)
                report.add("submit one block", CHOSEN, way.value, page, one * 1e6, "us")
                many = timed_calls(partial(engine.copy, way, ids, slots), 20) / len(ids)
                report.add("submit 2048, a block", CHOSEN, way.value, page, many * 1e6, "us")
            floor = timed_calls(partial(driver_calls, engine), 500)
            report.add("record wait launch record", "driver", "", page, floor * 1e6, "us")
            engine.close()


def driver_calls(engine: CudaCopyEngine) -> Ticket:
    """What one submission asks of the driver, with everything prepared."""
    driver, lane = cuda_driver(), engine._lanes[STORE]
    mover: Any = lane.movers[ZERO_COPY]
    stream = engine._streams[STORE][0].cuda_stream
    driver.wait(stream, engine._before())
    kernel = mover._kernel
    driver.launch(kernel._configuration_at, kernel._function, kernel._pointers_at)
    return CudaTicket(engine._events, stream)


def timed_calls(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of the call alone; the GPU is idle before each."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        made = work()
        times.append(time.perf_counter() - began)
        if isinstance(made, Ticket):
            made.wait()
    return statistics.median(times)


def latency(report: Report, memcpy: Memcpy, device: torch.device) -> None:
    """One block of 2 MiB, from submission to done, against one memcpy of as many bytes."""
    with rig(device, 32 << 10, 256 << 20, layers=64) as machine_:
        engine = CudaCopyEngine(
            machine_.layout, machine_.pool, 4, verification_of(machine_.layout, "always")
        )
        one, size = machine_.block_ids[:1], machine_.pool.slot_bytes
        for way in Direction:
            ours = until_done(partial(engine.copy, way, one, one), 101)
            plain = median_seconds(partial(memcpy.start, way, size), 101)
            report.add(
                "latency of 2 MiB", CHOSEN, way.value, 32 << 10, ours * 1e6, "us", ours / plain
            )
        engine.close()


def gpu_costs(report: Report, device: torch.device) -> None:
    """What storing without pause costs the model, and how much of the GPU the movers hold."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(a)
    big = torch.empty(GIB, dtype=torch.uint8, device=device)
    work: dict[str, tuple[Callable[[], object], int]] = {
        "8192^3 bf16 matmul": (lambda: torch.matmul(a, a, out=product), 60),
        "memory-bound add": (lambda: big.add_(1), 120),
    }

    def add(path: str, page: int, store: Callable[[], Ticket]) -> None:
        for name, (kernel, repeats) in work.items():
            slower, seconds = beside(kernel, repeats, store)
            report.add(f"slow-down {name}", path, "store", page, 100 * slower, "%")
            report.add(f"beside {name}", path, "store", page, STORED_BESIDE / seconds / 1e9, "GB/s")

    add("memcpy", GIB, partial(store_plainly, Memcpy(device), EventPool()))
    for page in (16 << 10, 64 << 10):
        with rig(device, page, GIB) as machine_:
            engine = CudaCopyEngine(
                machine_.layout, machine_.pool, 4, verification_of(machine_.layout, "always")
            )
            lane = machine_.lane(STORE, ZERO_COPY, 8)
            add(CHOSEN, page, partial(engine.copy, STORE, machine_.block_ids, machine_.slots))
            add(f"{CHOSEN} {ZERO_COPY}", page, partial(machine_.start, lane))
            engine.close()
            report.add("SM time, staged", CHOSEN, "store", page, 100 * staged_share(machine_), "%")


def store_plainly(plain: Memcpy, events: EventPool) -> CudaTicket:
    """One memcpy of 1 GiB on the current stream."""
    plain.host[:GIB].copy_(plain.gpu[:GIB], non_blocking=True)
    return CudaTicket(events, torch.cuda.current_stream().cuda_stream)


def beside(
    kernel: Callable[[], object], repeats: int, store: Callable[[], Ticket], rounds: int = 7
) -> tuple[float, float]:
    """By which share a kernel is slower while STORED_BESIDE bytes are stored, and for how long.

    The GPU computes without a pause, beside stores in every other stretch of `repeats` kernels:
    after a pause its clock is higher for some tenths of a second, which makes a matrix product up
    to 15 % faster than in the stretch that follows.
    """
    side = torch.cuda.Stream()
    stretches: dict[bool, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {
        False: [],
        True: [],
    }
    durations = []
    for turn in range(-4, 2 * rounds):
        begin, end, stored = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        begin.record()
        storing = turn % 2 == 1
        if storing:
            side.wait_event(begin)
            with torch.cuda.stream(side):
                tickets = [store() for _ in range(STORED_BESIDE // GIB)]
                for ticket in tickets:
                    assert isinstance(ticket, CudaTicket)
                    ticket.hold(side.cuda_stream)
                stored.record()
        for _ in range(repeats):
            kernel()
        end.record()
        if storing:
            torch.cuda.current_stream().wait_event(stored)
        if turn >= 0:
            stretches[storing].append((begin, end))
            if storing:
                durations.append((begin, stored))
    torch.cuda.synchronize()
    alone, longer, duration = (
        statistics.median(one.elapsed_time(other) for one, other in pairs)
        for pairs in (stretches[False], stretches[True], durations)
    )
    extra = longer - alone
    return extra / (min(duration, longer) - extra), duration / 1e3


def model_time(kernel: Callable[[], object], repeats: int) -> float:
    """Seconds of one kernel on the current stream."""
    kernel()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        kernel()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats / 1e3


def staged_share(machine_: Rig) -> float:
    """Programs' time over the copy's duration, on all SMs: a grid holds one SM a program."""
    lane = machine_.lane(STORE, STAGED, 8)
    mover: Any = lane.movers[STAGED]
    whole = median_seconds(partial(machine_.start, lane))
    count = BUFFER_BYTES // machine_.pool.slot_bytes
    rows = mover._near_ids.data_ptr()
    stream = torch.cuda.current_stream().cuda_stream

    def chunk() -> None:
        mover._kernel.launch(rows, mover._buffers.data_ptr(), count, STAGED_PROGRAMS, stream)

    torch.cuda.synchronize()
    kernel = model_time(chunk, 20) * machine_.num_blocks / count
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    return kernel * STAGED_PROGRAMS / (whole * sms)


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Bandwidth against page size, one line per path; left the stores, right the loads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True)
    for axis, way in zip(axes, ("store", "load"), strict=True):
        ours = [r for r in rows if r["what"] == "bandwidth" and r["direction"] == way]
        for name in dict.fromkeys(r["path"] for r in ours):
            points = sorted((r["page_bytes"] / 1024, r["value"]) for r in ours if r["path"] == name)
            width = 3 if name == CHOSEN else 1.2
            axis.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=name)
        axis.set(xscale="log", xlabel="page in KiB", title=way)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("GB/s")
    axes[1].legend(fontsize=8)
    figure.suptitle(f"1 GiB of scattered blocks, {rows[0]['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", nargs="+", type=int, default=list(PAGES), help="in bytes")
    parser.add_argument("--commit", default="", help="commit under test")
    parser.add_argument("--out", type=Path, default=Path("bench/results/transfer.csv"))
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    report = Report(machine() | {"commit": args.commit})
    plain = Memcpy(device)
    memcpy = {way.value: GIB / median_seconds(partial(plain.start, way)) for way in Direction}
    memcpy["both"] = 2 * GIB / median_seconds(plain.both)
    for way in Direction:
        seconds = median_seconds(partial(plain.start, way, SLOW_PATH_BYTES), 9)
        memcpy[f"{way.value} 64 MiB"] = SLOW_PATH_BYTES / seconds
    for name, speed in memcpy.items():
        way_name, _, less = name.partition(" ")
        size = SLOW_PATH_BYTES if less else GIB
        report.add(f"bandwidth {less}".strip(), "memcpy", way_name, size, speed / 1e9, "GB/s", 1.0)
    latency(report, plain, device)
    del plain
    host_costs(report, device)
    for page in args.pages:
        bandwidth(report, memcpy, device, page)
    programs(report, memcpy, device)
    gpu_costs(report, device)
    rows = [report.facts | row for row in report.rows]
    for row in rows:
        append(args.out, row)
    picture([row for row in rows if row["path"] != "memcpy"], args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
