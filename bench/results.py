"""Rows of measurements: what they were measured on, and the file they are kept in."""

from __future__ import annotations

import csv
import importlib.metadata
import subprocess
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def machine() -> dict[str, str]:
    """What the rows were measured on."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.check_output(query, text=True).splitlines()[0].split(", ")
    return {
        "device": name,
        "driver": driver,
        "torch": _version("torch"),
        "triton": _version("triton"),
        "vllm": _version("vllm"),
        "date": time.strftime("%Y-%m-%d"),
    }


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, with a header if it is new."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
