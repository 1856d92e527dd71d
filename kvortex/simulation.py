"""A simulation: one trace, several policies and sizes, on all cores; as rows, table and picture."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING

from kvortex.core import ConfigError
from kvortex.plugins import load_admission, load_policy
from kvortex.simulator import CLAIRVOYANT, Outcome, distinct_blocks, replay
from kvortex.trace import read_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kvortex.trace import Request

_requests: list[Request] = []
"""Of this process: a worker reads the trace once, for all that it replays."""


def simulate(
    trace: Path,
    policies: Sequence[str],
    capacities: Sequence[str],
    admission: str,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Replay a trace through every policy at every capacity.

    Args:
        trace: in Mooncake's format.
        policies: registered names, or "clairvoyant".
        capacities: numbers of blocks, or shares of the trace's distinct blocks like "5%".
        admission: name of a filter, for all of them.
        say: called with each line of progress.

    Raises:
        ConfigError: the trace cannot be read, or a name or capacity is none.
    """
    load_admission(admission, 1)
    for policy in policies:
        if policy != CLAIRVOYANT:
            load_policy(policy, 1)
    _read(trace)
    sizes = [_blocks(capacity, distinct_blocks(_requests)) for capacity in capacities]
    tasks = [(policy, size, admission) for policy in policies for size in sizes]
    outcomes: dict[tuple[str, int, str], Outcome] = {}
    with ProcessPoolExecutor(os.cpu_count(), initializer=_read, initargs=(trace,)) as workers:
        under_way = {workers.submit(_replay, *task): task for task in tasks}
        for done in as_completed(under_way):
            policy, size, _ = under_way[done]
            outcomes[under_way[done]] = done.result()
            say(f"{len(outcomes)} of {len(tasks)}: {policy} with {size} blocks")
    return [outcomes[task] for task in tasks]


def table(outcomes: Sequence[Outcome], tokens_per_s: float | None = None) -> str:
    """For a person's eyes; with a prefill speed also the seconds that were saved."""
    lines = [f"{'policy':12} {'blocks':>8} {'share':>7} {'hits':>7} {'tokens':>7} {'written':>8}"]
    if tokens_per_s is not None:
        lines[0] += f" {'saved':>10}"
    for row in outcomes:
        line = f"{row.policy:12} {row.capacity_blocks:8} {row.capacity_share:7.1%} "
        line += f"{row.block_hit_rate:7.4f} {row.token_hit_rate:7.4f} {row.blocks_written:8}"
        if tokens_per_s is not None:
            line += f" {row.hit_tokens / tokens_per_s:8.0f} s"
        lines.append(line)
    return "\n".join(lines)


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Hit rate against capacity, one line for each policy.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'kvortex[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5))
    for policy in dict.fromkeys(row.policy for row in outcomes):
        points = [(r.capacity_share, r.block_hit_rate) for r in outcomes if r.policy == policy]
        shares, rates = zip(*sorted(points), strict=True)
        style = {"linestyle": "--", "color": "grey"} if policy == CLAIRVOYANT else {"marker": "o"}
        axis.plot(shares, rates, label=policy, **style)
    axis.set(xscale="log", xlabel="capacity, share of distinct blocks", ylabel="block hit rate")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from None
    finally:
        pyplot.close(figure)


def _read(trace: Path) -> None:
    _requests[:] = read_trace(trace)


def _replay(policy: str, capacity: int, admission: str) -> Outcome:
    return replay(_requests, policy, capacity, admission)


def _blocks(capacity: str, distinct: int) -> int:
    try:
        share = capacity.endswith("%")
        blocks = int(float(capacity[:-1]) / 100 * distinct) if share else int(capacity)
    except (ValueError, OverflowError):
        blocks = 0
    if not 1 <= blocks <= 1 << 40:
        raise ConfigError(
            f"--capacity {capacity}: use a number of blocks, or a share of the trace's {distinct} "
            "distinct blocks like 5%"
        )
    return blocks
