"""What policies make of traces: one's own, and synthetic ones.

    python bench/bench_policies.py trace.jsonl --commit $(git rev-parse --short HEAD)

Appends rows to bench/results/policies.csv and draws a picture for each trace beside it. `lru_freq`
runs with `adaptive` admission, as by default; the others with none.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from results import append
from workloads import WORKLOADS, write

from kvortex.plugins import policy_names
from kvortex.simulation import plot, simulate, table
from kvortex.simulator import CLAIRVOYANT, Outcome

CAPACITIES = ("1%", "5%", "10%", "25%")
REQUESTS = 12_000


def compare(trace: Path) -> list[Outcome]:
    """Every policy at every size."""
    others = [name for name in policy_names() if name != "lru_freq"]
    ours = simulate(trace, ["lru_freq"], CAPACITIES, "adaptive", say)
    return ours + simulate(trace, [*others, CLAIRVOYANT], CAPACITIES, "always", say)


def against_the_best(rows: list[Outcome]) -> str:
    """Ours over the best other's hits, at each size."""
    told = []
    for share in dict.fromkeys(row.capacity_share for row in rows):
        here = {r.policy: r.block_hit_rate for r in rows if r.capacity_share == share}
        ours = here.pop("lru_freq")
        here.pop(CLAIRVOYANT)
        best = max(here, key=lambda policy: here[policy])
        told.append(
            f"{share:.0%}: {ours / here[best]:.3f} of {best}, {ours / here['lru']:.3f} of lru"
        )
    return "; ".join(told)


def say(line: str) -> None:
    print(line, file=sys.stderr, end="\r")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--commit", default="", help="commit under test")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic ones")
    parser.add_argument("--out", type=Path, default=Path("bench/results/policies.csv"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        traces = {trace.stem: trace for trace in args.traces}
        for workload in WORKLOADS:
            name = f"{workload}-{args.seed}" if args.seed else workload
            traces[name] = Path(folder) / f"{name}.jsonl"
            write(workload, REQUESTS, traces[name], args.seed)
        for name, trace in traces.items():
            rows = compare(trace)
            print(f"\n{name}\n{table(rows)}\n{against_the_best(rows)}", flush=True)
            facts = {"date": time.strftime("%Y-%m-%d"), "commit": args.commit, "trace": name}
            for row in rows:
                append(args.out, facts | row.as_dict())
            plot(rows, args.out.with_name(f"policies-{name}.png"))


if __name__ == "__main__":
    main()
