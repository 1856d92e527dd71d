"""How soon a pool of pinned host memory can be used, beside what others do, in one run.

    python bench/bench_pool.py --commit $(git rev-parse --short HEAD)

Appends rows to bench/results/pool.csv. Every way has a process of its own, whose CUDA context is
open before the clock starts. All of the memory was touched once before the first: in a virtual
machine the first touch of a page has the host look for one, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from results import append, machine

from kvortex.host_memory import HostMemory
from kvortex.host_pool import HostPool
from kvortex.numa import choose_node, node_of_gpu, nodes_of, nodes_with_memory

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 1 << 30
LAYERS = 32
SLOT_BYTES = 2 << 20
"""Of a block of 16 tokens of an 8B Llama in bf16."""
TOUCH_BYTES = 64 << 20
Times = dict[str, float]


def kvortex(size: int) -> Times:
    """A HostPool; `stall` is how long the thread that opened it was kept from running meanwhile."""
    node = choose_node(None, torch.device("cuda", 0))
    began = time.perf_counter()
    pool = HostPool(size // SLOT_BYTES, SLOT_BYTES, pinned=True, node=node)
    usable = time.perf_counter()
    last, stall = usable, 0.0
    while pool.num_ready_slots < pool.num_slots:
        time.sleep(0.0001)
        now = time.perf_counter()
        last, stall = now, max(stall, now - last)
    ready = time.perf_counter()
    placed = nodes_of(pool.address, size)
    huge = huge_bytes()
    closing = time.perf_counter()
    pool.close()
    return {
        "usable_s": usable - began,
        "ready_s": ready - began,
        "stall_s": stall,
        "close_s": time.perf_counter() - closing,
        "huge_pages": huge / size,
        "on_gpu_node": placed.get(node_of_gpu(torch.device("cuda", 0)) or 0, 0.0),
    }


def torch_pinned(size: int) -> Times:
    """One tensor of torch's pinned allocator, which takes the next power of two."""
    return timed(lambda: [torch.empty(size, dtype=torch.uint8, pin_memory=True)])


def vllm_offloading(size: int) -> Times:
    """As vLLM's OffloadingConnector: pinned zeros for each layer."""
    shape = (size // LAYERS,)
    return timed(
        lambda: [torch.zeros(shape, dtype=torch.int8, pin_memory=True) for _ in range(LAYERS)]
    )


def vllm_simple(size: int) -> Times:
    """As vLLM's SimpleCPUOffloadConnector: zeros for each layer, registered afterwards."""

    def allocate() -> list[torch.Tensor]:
        layers = []
        for _ in range(LAYERS):
            layers.append(torch.zeros(size // LAYERS, dtype=torch.int8))
            status = torch.cuda.cudart().cudaHostRegister(layers[-1].data_ptr(), size // LAYERS, 0)
            assert int(status) == 0
        return layers

    return timed(allocate, unpin)


def unpin(layers: list[torch.Tensor]) -> None:
    for layer in layers:
        torch.cuda.cudart().cudaHostUnregister(layer.data_ptr())


def timed(
    allocate: Callable[[], list[torch.Tensor]],
    unpin: Callable[[list[torch.Tensor]], None] | None = None,
) -> Times:
    """Nothing can be used before everything is there."""
    began = time.perf_counter()
    tensors = allocate()
    ready = time.perf_counter()
    if unpin is not None:
        unpin(tensors)
    del tensors
    torch._C._host_emptyCache()
    closed = time.perf_counter()
    return {"usable_s": ready - began, "ready_s": ready - began, "close_s": closed - ready}


WAYS = {
    "kvortex": kvortex,
    "torch pinned": torch_pinned,
    "vLLM OffloadingConnector": vllm_offloading,
    "vLLM SimpleCPUOffloadConnector": vllm_simple,
}


def huge_bytes() -> int:
    """Anonymous memory of this process on huge pages."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


def touch(size: int) -> None:
    """Use memory once and give it back."""
    memory = HostMemory(size)
    with ThreadPoolExecutor() as threads:
        for start in range(0, size, TOUCH_BYTES):
            threads.submit(memory.populate, start, min(TOUCH_BYTES, size - start))
    memory.close()


def measured_here(way: str, size: int, rounds: int) -> None:
    """In the process of one way: print a JSON object of medians."""
    torch.zeros(1, device="cuda")
    times = [WAYS[way](size) for _ in range(rounds)]
    print(json.dumps({name: median(each[name] for each in times) for name in times[0]}))


def measured(way: str, gib: float, rounds: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--here", way, "--gib", str(gib), "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise SystemExit(done.returncode)
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {name: float(f"{value:.3g}") for name, value in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="*", default=list(WAYS), help=", ".join(WAYS))
    parser.add_argument("--gib", type=float, default=24, help="size of the pool")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commit", default="", help="commit under test")
    parser.add_argument("--out", type=Path, default=Path("bench/results/pool.csv"))
    parser.add_argument("--here", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = int(args.gib * GIB)
    if args.here:
        return measured_here(args.here, size, args.rounds)
    began = time.perf_counter()
    touch(size * 4 // 3)
    print(f"touched {args.gib * 4 / 3:.0f} GiB in {time.perf_counter() - began:.1f} s", flush=True)
    columns = ["usable_s", "ready_s", "close_s", "stall_s", "huge_pages", "on_gpu_node"]
    facts = machine() | {"commit": args.commit, "cores": len(os.sched_getaffinity(0))}
    for way in args.ways:
        times = measured(way, args.gib, args.rounds)
        row = facts | {"way": way, "gib": args.gib, "rounds": args.rounds}
        row |= {name: times.get(name, "") for name in columns}
        row |= {"numa_nodes": len(nodes_with_memory())}
        append(args.out, row)
        print(f"{way:32} {times}", flush=True)
    return None


if __name__ == "__main__":
    main()
