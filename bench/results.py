"""Rows of measurements: what they were measured on, and the file they are kept in."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

from kvortex.benchmark.machine import machine

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["append", "machine"]


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, with a header if it is new."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
