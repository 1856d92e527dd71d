"""What it costs to verify every byte on its way, and whether good bytes are ever called bad.

    python bench/bench_verification.py --commit $(git rev-parse --short HEAD) --seconds 60

Appends rows to bench/results/verification.csv: each mover's bandwidth with and without checksums,
in turns, for scattered blocks of half a GiB; then how many bytes were verified in so many seconds
of stores and loads, and how many of their blocks were called bad (none were touched).
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from results import append, machine

from kvortex.calibration import DMA, STAGED, ZERO_COPY
from kvortex.core import Direction
from kvortex.tune import Rig, rig

if TYPE_CHECKING:
    from kvortex.verification import Verify

PAGES = (4 << 10, 8 << 10, 16 << 10, 64 << 10, 512 << 10)
NBYTES = 1 << 29
PROGRAMS = {ZERO_COPY: (4, 8, 16), STAGED: (16,), DMA: (16,)}
"""Of a kernel's grid; the staged and the DMA mover choose theirs themselves."""
MODES: tuple[Verify, ...] = ("off", "always", "sampled")


def bandwidths(
    rig_: Rig, way: Direction, mover: str, programs: int, rounds: int
) -> dict[Verify, float]:
    """Median bytes per second of each mode, measured in turns."""
    lanes = {mode: rig_.lane(way, mover, programs, mode) for mode in MODES}
    seconds: dict[Verify, list[float]] = {mode: [] for mode in MODES}
    for number in range(rounds + 1):
        for mode, lane in lanes.items():
            began = time.perf_counter()
            rig_.start(lane)
            torch.cuda.synchronize()
            if number:
                seconds[mode].append(time.perf_counter() - began)
    return {mode: rig_.nbytes / statistics.median(took) for mode, took in seconds.items()}


def false_alarms(device: torch.device, page: int, seconds: float) -> tuple[int, int]:
    """Bytes that were stored and loaded, and blocks that were called bad, of those loads."""
    with rig(device, page, NBYTES) as rig_:
        store, load = (rig_.lane(way, ZERO_COPY, 8) for way in Direction)
        verified = bad = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            rig_.start(store).wait()
            tickets = [rig_.start(load) for _ in range(8)]
            torch.cuda.synchronize()
            bad += sum(len(ticket.bad_block_ids) for ticket in tickets if ticket.wait())
            verified += rig_.nbytes * len(tickets)
    return verified, bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", nargs="+", type=int, default=list(PAGES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60, help="of the search for false alarms")
    parser.add_argument("--commit", default="", help="commit under test")
    parser.add_argument("--out", type=Path, default=Path("bench/results/verification.csv"))
    args = parser.parse_args()
    device, facts = torch.device("cuda", 0), machine() | {"commit": args.commit}
    tell = partial(_tell, args.out, facts)
    for page in args.pages:
        with rig(device, page, NBYTES) as rig_:
            for mover, grids in PROGRAMS.items():
                if mover == DMA and page < 64 << 10:  # poor there, whatever is verified
                    continue
                for way in Direction:
                    for grid in grids:
                        found = bandwidths(rig_, way, mover, grid, args.rounds)
                        row = {"mover": mover, "programs": grid, "direction": way.value}
                        for mode, speed in found.items():
                            share = speed / found["off"]
                            row |= {"page_bytes": page, "verify": mode, "unit": "GB/s"}
                            tell(speed / 1e9, share, **row)
    for page in (4 << 10, 16 << 10):
        verified, bad = false_alarms(device, page, args.seconds / 2)
        row = {"mover": ZERO_COPY, "programs": 8, "direction": "load", "page_bytes": page}
        tell(verified / 1e9, bad, **row, verify="always", unit="GB verified")


def _tell(out: Path, facts: dict[str, Any], value: float, beside: float, **row: object) -> None:
    """`beside` is the share of what is reached without checksums, or the number of bad blocks."""
    row |= {"value": f"{value:.4g}", "of_off_or_bad_blocks": f"{beside:.4g}"}
    print(*row.values(), flush=True)
    append(out, facts | row)


if __name__ == "__main__":
    main()
