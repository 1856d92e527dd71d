"""Checks of the GPUs and of their links to host memory."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvortex.calibration import load_calibration
from kvortex.core import Direction, PoolAllocationError
from kvortex.doctor.finding import Finding, Verdict
from kvortex.doctor.pcie import PcieLink, link_now, link_possible
from kvortex.host_pool import HostPool
from kvortex.numa import choose_node

if TYPE_CHECKING:
    from collections.abc import Callable

DRIVER = Path("/proc/driver/nvidia/version")
DEVICES = Path("/sys/bus/pci/devices")
MEASURED_BYTES = 256 << 20
ROUNDS = 5
ENOUGH = 0.75
"""Of what a link could carry a good one delivers 0.83 to 0.88 (55.4 of 63 GB/s on an H200)."""
POOR = 0.25
NO_GPU = "no NVIDIA GPU that torch can use"


def gpus() -> list[torch.device]:
    """Those that torch can use; ROCm's are not KVortex's."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return []
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def check_no_gpu() -> Finding:
    """Why torch sees none."""
    if not DRIVER.exists():
        # No failure: on a CPU it runs for tests and demonstrations. But scripts shall see it.
        what = f"{NO_GPU}: there is no NVIDIA driver"
        return Finding("GPU", Verdict.WARN, what, "in a container, start it with the GPU")
    if torch.version.cuda is None:
        what = f"an NVIDIA driver, but torch {torch.__version__} is built without CUDA"
        return Finding("GPU", Verdict.FAIL, what, "install torch and vLLM for CUDA")
    reason = "its driver may be too old for it"
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    what = f"an NVIDIA driver, but torch {torch.__version__} cannot use it: {reason}"
    return Finding("GPU", Verdict.FAIL, what, "compare nvidia-smi's CUDA version with torch's")


def check_gpu(device: torch.device) -> Finding:
    """Which one it is."""
    facts: Any = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    found = f"{facts.name}, {total / (1 << 30):.0f} GiB, {free / (1 << 30):.0f} GiB free"
    told = {"name": facts.name, "total_bytes": total, "free_bytes": free}
    return Finding(f"GPU {device.index}", Verdict.OK, found, facts=told)


def check_link(device: torch.device) -> list[Finding]:
    """Its link as it is while it copies, and how fast that is."""
    card = _card(device)
    seen: list[PcieLink | None] = []
    try:
        speeds = measure(device, lambda: seen.append(_told(link_now, card)))
    except PoolAllocationError as error:
        what = f"pinned memory cannot be had: {_first(error)}"
        return [Finding(f"link {device.index}", Verdict.FAIL, what)]
    except RuntimeError as error:  # as when vLLM has all of the GPU's memory
        return [Finding(f"link {device.index}", Verdict.UNSEEN, f"not measured: {_first(error)}")]
    possible = _told(link_possible, card)
    now = max((link for link in seen if link), key=lambda link: link.gb_s, default=None)
    return [judge_link(device.index, now, possible), judge_speed(device.index, speeds, possible)]


@dataclass(frozen=True, slots=True)
class Speeds:
    """GB/s each way."""

    store: float
    load: float


def measure(device: torch.device, look: Callable[[], None]) -> Speeds:
    """Copy pinned memory both ways; `look` is called while copies are under way.

    Raises:
        PoolAllocationError, RuntimeError: there is no memory for it.
    """
    node = choose_node(None, device)
    with torch.cuda.device(device), HostPool(1, MEASURED_BYTES, pinned=True, node=node) as pool:
        pool.wait_until_ready()
        there = torch.empty(MEASURED_BYTES, dtype=torch.uint8, device=device)
        ends = {Direction.STORE: (pool.bytes[0], there), Direction.LOAD: (there, pool.bytes[0])}
        speeds = {}
        for way, (target, source) in ends.items():
            target.copy_(source, non_blocking=True)
            look()
            torch.cuda.synchronize(device)
            speeds[way] = MEASURED_BYTES / _seconds(target, source) / 1e9
    return Speeds(speeds[Direction.STORE], speeds[Direction.LOAD])


def judge_link(number: int, now: PcieLink | None, possible: PcieLink | None) -> Finding:
    """Whether the link is what it could be."""
    subject = f"PCIe {number}"
    if now is None or possible is None:
        return Finding(subject, Verdict.UNSEEN, "this machine does not tell of the link")
    facts = {
        "now": {"gt_s": now.gt_s, "width": now.width},
        "possible": {"gt_s": possible.gt_s, "width": possible.width},
    }
    if now.width < possible.width or now.gt_s < possible.gt_s:
        advice = "reseat the card, or try another slot, riser or BIOS setting"
        return Finding(subject, Verdict.WARN, f"{now}; {possible} is possible", advice, facts)
    return Finding(subject, Verdict.OK, f"{now}, all that is possible", facts=facts)


def judge_speed(number: int, speeds: Speeds, possible: PcieLink | None) -> Finding:
    """Whether the link delivers what it should."""
    subject = f"link {number}"
    found = f"store {speeds.store:.1f} GB/s, load {speeds.load:.1f} GB/s"
    facts = {"store_gb_s": speeds.store, "load_gb_s": speeds.load}
    if possible is None:
        return Finding(subject, Verdict.OK, found, facts=facts)
    facts["possible_gb_s"] = possible.gb_s
    share = min(speeds.store, speeds.load) / possible.gb_s
    found += f"; {possible} carries {possible.gb_s:.1f} at most"
    if share >= ENOUGH:
        return Finding(subject, Verdict.OK, found, facts=facts)
    advice = "other work on the link, a shared PCIe switch, another NUMA node or a limit of the VM?"
    verdict = Verdict.WARN if share >= POOR else Verdict.FAIL
    return Finding(subject, verdict, found, advice, facts)


def check_tuning(device: torch.device | None) -> Finding:
    """Whether `kvortex tune` ran for this GPU, link and driver."""
    if device is None:
        return Finding("tuning", Verdict.UNSEEN, NO_GPU)
    calibration = load_calibration(device)
    if "defaults" in calibration.origin:
        found, advice = "defaults for copies", "kvortex tune measures this machine in seconds"
        return Finding("tuning", Verdict.WARN, found, advice)
    return Finding("tuning", Verdict.OK, f"measured, in {calibration.origin}")


def _seconds(target: torch.Tensor, source: torch.Tensor) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _told(read: Callable[[Path], PcieLink], card: Path | None) -> PcieLink | None:
    """None where the machine does not tell."""
    try:
        return None if card is None else read(card)
    except (OSError, ValueError, IndexError):
        return None


def _card(device: torch.device) -> Path | None:
    """The GPU's folder; an older torch does not tell its address."""
    facts: Any = torch.cuda.get_device_properties(device)
    try:
        domain, bus, number = facts.pci_domain_id, facts.pci_bus_id, facts.pci_device_id
    except AttributeError:
        return None
    return (DEVICES / f"{domain:04x}:{bus:02x}:{number:02x}.0").resolve()


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
