"""`kvortex tune`: which way of copying is fastest on this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvortex.commands import outcome
from kvortex.commands.progress import say
from kvortex.core import ConfigError, TransferError

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `tune`."""
    tune = commands.add_parser(
        "tune",
        help="measure which way of copying is fastest on this machine, and keep the result",
        epilog="example: kvortex tune --device 0",
    )
    tune.add_argument("--device", type=int, default=0, help="number of the GPU (default: 0)")
    tune.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    tune.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was measured, and keep it.

    Raises:
        ConfigError: no such GPU, or the result cannot be kept.
        TransferError: the GPU is too full to be measured.
    """
    import torch

    count = torch.cuda.device_count() if torch.version.hip is None else 0
    if arguments.device not in range(count):
        raise ConfigError(
            f"--device {arguments.device}: torch can use {count} NVIDIA GPUs on this machine; "
            + (f"use 0 to {count - 1}" if count else "there is nothing to measure without one")
        )
    from kvortex.calibration import machine_key, save_calibration
    from kvortex.tune import speeds, table, tune

    device = torch.device("cuda", arguments.device)
    with torch.cuda.device(device):
        try:
            calibration, rows = tune(device, say)
        except torch.OutOfMemoryError:
            raise TransferError("the GPU has no GiB of memory free to measure with") from None
    if arguments.json:
        told = [asdict(row) | {"direction": row.direction.value} for row in rows]
        print(json.dumps({"machine": machine_key(device), "rows": told}))
    else:
        print(f"{machine_key(device)}\n{table(rows, calibration)}")
    try:
        kept = save_calibration(device, calibration, speeds(rows))
        print(f"kept in {kept}", file=sys.stderr)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"the result cannot be kept ({error}); set XDG_CACHE_HOME") from None
    return outcome.OK
