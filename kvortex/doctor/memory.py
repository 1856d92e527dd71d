"""Checks of host memory: how much, where, and how it may be had."""

from __future__ import annotations

import mmap
import resource
from typing import TYPE_CHECKING

from kvortex.config import GIB
from kvortex.core import PoolAllocationError
from kvortex.doctor.finding import Finding, Verdict
from kvortex.free_memory import cgroup_limit_bytes, free_memory_bytes
from kvortex.host_memory import HUGE_PAGES, HostMemory
from kvortex.host_pool import HostPool
from kvortex.numa import node_of_gpu, nodes_of, nodes_with_memory, prefer_node

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

DEFAULT_POOL = 8 * GIB
LEAST_POOL = GIB
TRIED_BYTES = 64 << 20


def check_memory(free: int | None = None) -> Finding:
    """How large a pool may be now."""
    free = free_memory_bytes() if free is None else free
    limit = cgroup_limit_bytes()
    group = "no limit by the control group" if limit is None else f"of {_gib(limit)} by its group"
    found = f"{_gib(free)} free, {group}"
    facts = {"free_bytes": free, "cgroup_limit_bytes": limit}
    most = f"--ram-pool-gb {free * 0.9 / GIB:.3g} at most"
    if free >= DEFAULT_POOL:
        return Finding("memory", Verdict.OK, f"{found}: {most}", facts=facts)
    if free >= LEAST_POOL:
        return Finding("memory", Verdict.WARN, found, f"the default pool is 8 GiB; {most}", facts)
    return Finding("memory", Verdict.FAIL, found, "free memory, or raise the group's limit", facts)


def check_lock(devices: Sequence[torch.device], limit: int | None = None) -> Finding:
    """Whether the limit on locked memory lets a pool be pinned, tried where there is a GPU.

    NVIDIA's driver usually pins beyond it.
    """
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    if limit == resource.RLIM_INFINITY:
        return Finding("memory lock", Verdict.OK, "ulimit -l is unlimited")
    found = f"ulimit -l is {_gib(limit)}"
    facts = {"limit_bytes": limit}
    if not devices:
        what = f"{found}; whether that binds can only be tried with a GPU"
        return Finding("memory lock", Verdict.UNSEEN, what, facts=facts)
    tried = min(max(TRIED_BYTES, limit + TRIED_BYTES), free_memory_bytes() // 4)
    advice = "raise it: ulimit -l unlimited, or --ulimit memlock=-1 of Docker"
    try:
        with HostPool(1, tried, pinned=True) as pool:
            pool.wait_until_ready()
    except PoolAllocationError as error:
        what = f"{found}, and {_gib(tried)} cannot be pinned ({error})"
        return Finding("memory lock", Verdict.FAIL, what, advice, facts)
    if tried <= limit:
        return Finding("memory lock", Verdict.WARN, found, f"for a larger pool {advice}", facts)
    what = f"{found}, which the GPU's driver does not mind"
    return Finding("memory lock", Verdict.OK, what, facts=facts)


def check_huge_pages() -> Finding:
    """Whether the pool gets huge pages, with which it is pinned about four times as fast."""
    try:
        setting = HUGE_PAGES.read_text().strip()
    except OSError:
        return Finding("huge pages", Verdict.UNSEEN, "this kernel has none that are transparent")
    chosen = setting.partition("[")[2].partition("]")[0] or setting
    if chosen == "never":
        advice = f"echo madvise | sudo tee {HUGE_PAGES}: the pool is then pinned sooner"
        return Finding("huge pages", Verdict.WARN, chosen, advice)
    return Finding("huge pages", Verdict.OK, chosen)


def check_numa(devices: Sequence[torch.device]) -> Finding:
    """Whether the pool can be on the node next to each GPU."""
    nodes = nodes_with_memory()
    facts = {"nodes": nodes}
    if len(nodes) == 1:
        return Finding("NUMA", Verdict.OK, "one node, nothing to choose", facts=facts)
    found = f"{len(nodes)} nodes"
    if not devices:
        return Finding("NUMA", Verdict.UNSEEN, f"{found}, no GPU to be near to", facts=facts)
    near = {device.index: node_of_gpu(device) for device in devices}
    unknown = [str(number) for number, node in near.items() if node is None]
    if unknown:
        what = f"{found}; which is next to GPU {', '.join(unknown)} is not told"
        return Finding("NUMA", Verdict.WARN, what, "set numa_node, as nvidia-smi topo -m shows it")
    for node in sorted({node for node in near.values() if node is not None}):
        if not _can_place(node):
            advice = "a container needs --cap-add SYS_NICE, or start vLLM under numactl --membind"
            return Finding("NUMA", Verdict.WARN, f"memory cannot be put on node {node}", advice)
    shown = ", ".join(f"GPU {number} on node {node}" for number, node in near.items())
    return Finding("NUMA", Verdict.OK, f"{found}; {shown}, and memory can be put there")


def _can_place(node: int) -> bool:
    """Put some memory on a node and look."""
    size = 16 * mmap.PAGESIZE
    memory = HostMemory(size)
    try:
        if not prefer_node(memory.address, size, node):
            return False
        memory.populate(0, size)
        placed = nodes_of(memory.address, size)
        return not placed or placed.get(node, 0) > 0.5
    finally:
        memory.close()


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / (1 << 20):.3g} MiB"
