"""What each policy costs in a pool of a million blocks: time of each verb, memory of each block.

    python bench/bench_policy_costs.py --commit $(git rev-parse --short HEAD)

Appends rows to bench/results/policy_costs.csv. The pool is full and has turned over once, so that
ghosts are counted; the keys themselves are not, they belong to the tier.
"""

from __future__ import annotations

import argparse
import platform
import random
import time
import tracemalloc
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING

from results import append

from kvortex.plugins import load_policy, policy_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvortex.policies import EvictionPolicy

BLOCKS = 1_000_000
TIMED = 20_000


def filled(name: str, keys: list[bytes]) -> tuple[EvictionPolicy, set[bytes]]:
    """A policy after as many insertions as there are keys, twice its pool, and what it knows."""
    policy, resident = load_policy(name, BLOCKS), set[bytes]()
    for key in keys:
        policy.expect(key)
        if len(resident) == BLOCKS and (victim := policy.evict(none_pinned)) is not None:
            resident.remove(victim)
        policy.insert(key)
        resident.add(key)
    return policy, resident


def none_pinned(_key: bytes) -> bool:
    return False


def timed(act: Callable[[], object]) -> float:
    """Microseconds."""
    start = time.perf_counter_ns()
    act()
    return (time.perf_counter_ns() - start) / 1000


def times(policy: EvictionPolicy, resident: list[bytes]) -> dict[str, list[float]]:
    """Of hits in random order, then of an eviction and an insertion in turns."""
    draw = random.Random(0)
    used = [draw.choice(resident) for _ in range(TIMED)]
    took: dict[str, list[float]] = {"hit": [], "evict": [], "insert": []}
    for key in used:
        took["hit"].append(timed(lambda key=key: policy.hit(key)))  # type: ignore[misc]
    for number in range(TIMED):
        key = b"new" + number.to_bytes(29, "big")
        policy.expect(key)
        took["evict"].append(timed(lambda: policy.evict(none_pinned)))
        took["insert"].append(timed(lambda key=key: policy.insert(key)))  # type: ignore[misc]
    return took


def traced(name: str, keys: list[bytes]) -> int:
    """Bytes that the policy alone has taken."""
    tracemalloc.start()
    policy, resident = filled(name, keys)
    resident.clear()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del policy
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policies", nargs="*", default=policy_names())
    parser.add_argument("--commit", default="", help="commit under test")
    parser.add_argument("--out", type=Path, default=Path("bench/results/policy_costs.csv"))
    args = parser.parse_args()
    draw = random.Random(1)
    keys = [draw.randbytes(32) for _ in range(2 * BLOCKS)]
    facts = {"date": time.strftime("%Y-%m-%d"), "commit": args.commit}
    facts |= {"python": platform.python_version(), "cpu": platform.machine()}
    for name in args.policies:
        policy, resident = filled(name, keys)
        row: dict[str, object] = {**facts, "policy": name, "blocks": BLOCKS}
        for verb, took in times(policy, sorted(resident)).items():
            cuts = quantiles(took, n=10)
            row |= {f"{verb}_us_p{p}": round(cuts[p // 10 - 1], 2) for p in (20, 50, 80)}
        del policy, resident
        row["bytes_per_block"] = round(traced(name, keys) / BLOCKS)
        append(args.out, row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
