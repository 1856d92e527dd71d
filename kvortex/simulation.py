"""A simulation: one trace, several policies and sizes, on all cores; as rows, table and picture."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvortex.core import ConfigError
from kvortex.picture_file import save_picture
from kvortex.plugins import load_admission, load_policy
from kvortex.simulator import CLAIRVOYANT, Outcome, replay
from kvortex.trace import read_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from kvortex.trace import Trace

_traces: list[Trace] = []
"""One, of this process: a worker reads the trace once, for all that it replays."""
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def simulate(
    trace: Path,
    policies: Sequence[str],
    capacities: Sequence[str],
    admission: str,
    say: Callable[[str], None],
    disk: str | None = None,
    block_bytes: str | None = None,
) -> list[Outcome]:
    """Replay a trace through every policy at every capacity.

    Args:
        trace: of Mooncake's format, or recorded.
        policies: registered names, or "clairvoyant".
        capacities: numbers of blocks, shares of the trace's distinct blocks like "5%", or bytes
            like "64GiB".
        admission: name of a filter, for all of them.
        say: called with each line of progress.
        disk: capacity of a second tier.
        block_bytes: bytes of a block, like "64MiB", where the trace does not tell.

    Raises:
        ConfigError: the trace cannot be read, or a name or capacity is none.
    """
    load_admission(admission, 1)
    for policy in policies:
        if policy != CLAIRVOYANT:
            load_policy(policy, 1)
    _read(trace)
    size_of = _Sizes(_traces[0], block_bytes)
    sizes = list(dict.fromkeys(size_of("--capacity", capacity) for capacity in capacities))
    disk_blocks = 0 if disk is None else size_of("--disk", disk)
    tasks = [(policy, size, admission, disk_blocks) for policy in policies for size in sizes]
    outcomes: dict[tuple[str, int, str, int], Outcome] = {}
    with _workers(trace) as workers:
        under_way = {workers.submit(_replay, *task): task for task in tasks}
        for done in as_completed(under_way):
            policy, size, *_ = under_way[done]
            outcomes[under_way[done]] = done.result()
            say(f"{len(outcomes)} of {len(tasks)}: {policy} with {size} blocks")
    return [outcomes[task] for task in tasks]


def table(outcomes: Sequence[Outcome], tokens_per_s: float | None = None) -> str:
    """For a person's eyes; with a prefill speed also the seconds that were saved."""
    lines = [f"{'policy':12} {'blocks':>8} {'share':>7} {'hits':>7} {'tokens':>7} {'written':>8}"]
    disk = any(row.disk_blocks for row in outcomes)
    if disk:
        lines[0] += f" {'disk':>8} {'of hits':>7} {'written':>8}"
    if tokens_per_s is not None:
        lines[0] += f" {'saved':>10}"
    for row in outcomes:
        line = f"{row.policy:12} {row.capacity_blocks:8} {row.capacity_share:7.1%} "
        line += f"{row.block_hit_rate:7.4f} {row.token_hit_rate:7.4f} {row.blocks_written:8}"
        if disk:
            line += f" {row.disk_blocks:8} {row.disk_hit_rate:7.4f} {row.disk_blocks_written:8}"
        if tokens_per_s is not None:
            line += f" {row.hit_tokens / tokens_per_s:8.0f} s"
        lines.append(line)
    return "\n".join(lines)


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Hit rate against capacity, one line for each policy.

    Raises:
        ConfigError: the file cannot be written.
    """
    import matplotlib

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
    save_picture(figure, path)


@contextmanager
def _workers(trace: Path) -> Iterator[ProcessPoolExecutor]:
    """A process for each core; after an error or ctrl-c they are ended, not waited for."""
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(os.cpu_count(), initializer=_begin, initargs=(trace,)) as workers:
        try:
            yield workers
        except BaseException:
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()  # it has nothing to clean up, and may have caught a milder signal
            workers.shutdown(cancel_futures=True)
            raise


def _begin(trace: Path) -> None:
    """In a worker: ctrl-c reaches all processes of a terminal; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _read(trace)


def _read(trace: Path) -> None:
    _traces[:] = [read_trace(trace)]


def _replay(policy: str, capacity: int, admission: str, disk_blocks: int) -> Outcome:
    return replay(_traces[0], policy, capacity, admission, disk_blocks)


class _Sizes:
    """Turns what a user writes into blocks."""

    def __init__(self, trace: Trace, block_bytes: str | None) -> None:
        self._distinct = trace.distinct_blocks()
        self._block_bytes = trace.block_bytes
        if block_bytes is not None:
            self._block_bytes = _bytes(block_bytes)
            if self._block_bytes is None:
                raise ConfigError(f"--block-bytes {block_bytes}: use a size like 64MiB")

    def __call__(self, option: str, capacity: str) -> int:
        blocks = self._blocks(option, capacity)
        if blocks is None or not 1 <= blocks <= 1 << 40:
            raise ConfigError(
                f"{option} {capacity}: use a number of blocks, a share of the trace's "
                f"{self._distinct} distinct blocks like 5%, or a size like 64GiB that holds a block"
            )
        return blocks

    def _blocks(self, option: str, capacity: str) -> int | None:
        size = _bytes(capacity)
        if size is not None:
            if self._block_bytes is None:
                raise ConfigError(
                    f"{option} {capacity}: this trace does not tell how large a block is; add "
                    "--block-bytes"
                )
            return size // self._block_bytes
        try:
            if capacity.endswith("%"):
                share = float(capacity[:-1]) / 100
                return max(int(share * self._distinct), int(share > 0))  # of any trace, a block
            return int(capacity)
        except (ValueError, OverflowError):
            return None


def _bytes(text: str) -> int | None:
    """A number with a unit; None if it is not one, or less than a byte."""
    number = text.rstrip("BbGgIiKkMmTt")
    unit = UNITS.get(text[len(number) :].upper())
    try:
        return None if unit is None else int(float(number) * unit) or None
    except (ValueError, OverflowError):
        return None
