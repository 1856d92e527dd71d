"""The two pictures of the README, drawn from rows that other scripts here measured.

    python bench/draw_readme.py

`ttft.png` has one run: the newest of ttft.csv in which every way of offloading was measured.
`hit_rate.png` has the newest rows of each policy on the trace of conversations.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

RESULTS = Path(__file__).parent / "results"
TRACE = "mooncake_conversation_trace"
WAYS = {
    "none": ("computed again", "#b8bcc4"),
    "native": ("vLLM OffloadingConnector", "#e0a458"),
    "simple": ("vLLM SimpleCPUOffloadConnector", "#6f9f6b"),
    "kvortex": ("KVortex", "#3d5afe"),
}
POLICIES = {
    ("clairvoyant", ""): ("the optimum, which knows the future", "#9aa0a6", "--"),
    ("lru_freq", "adaptive"): ("KVortex: lru_freq, adaptive admission", "#3d5afe", "-"),
    ("arc", "always"): ("arc, an option of vLLM's OffloadingConnector", "#e0a458", "-"),
    ("lru", "always"): ("lru, as both of vLLM's connectors by default", "#6f9f6b", "-"),
}
Row = dict[str, str]


def rows(name: str) -> list[Row]:
    """Of a file of results, oldest first."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def whole_run(measured: Iterable[Row]) -> list[Row]:
    """Of the newest run that has every way; a picture must not mix machines or days."""
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in measured:
        run = tuple(row[name] for name in ("date", "commit", "device", "driver", "vllm"))
        runs.setdefault(run, []).append(row)
    whole = [run for run in runs.values() if {row["way"] for row in run} == WAYS.keys()]
    return whole[-1]


def newest(measured: Iterable[Row]) -> dict[tuple[str, str], dict[float, float]]:
    """Hit rate by share of the distinct blocks, for each policy and admission."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for row in measured:
        if row["trace"] == TRACE and row["disk_blocks"] == "0":
            policy = found.setdefault((row["policy"], row["admission"]), {})
            policy[round(float(row["capacity_share"]), 3)] = float(row["block_hit_rate"])
    return found


def draw_ttft(figure: Any, run: list[Row]) -> None:
    """A panel for each prompt length, a bar for each way; lines span the middle 60 %."""
    lengths = sorted({int(row["prompt_tokens"]) for row in run})
    places = range(len(WAYS))
    for axes, length in zip(figure.subplots(1, len(lengths)), lengths, strict=True):
        here = {row["way"]: row for row in run if int(row["prompt_tokens"]) == length}
        low, mid, high = (
            [1000 * float(here[way][f"host_hit_{point}_s"]) for way in WAYS]
            for point in ("p20", "p50", "p80")
        )
        axes.bar(places, mid, color=[color for _, color in WAYS.values()])
        axes.vlines(places, low, high, color="#202124", linewidth=0.8)
        for at, (value, top) in enumerate(zip(mid, high, strict=True)):
            axes.annotate(
                f"{value:.4g}", (at, top), (0, 3), textcoords="offset points", ha="center"
            )
        axes.set(xticks=[], title=f"{length:,} tokens", ylim=(0, 1.15 * max(high)))
        decorate(axes)
    figure.axes[0].set_ylabel("milliseconds to the first token")
    bars = figure.axes[0].patches
    names = [name for name, _ in WAYS.values()]
    figure.legend(bars, names, loc="lower center", ncols=2, frameon=False)
    first = run[0]
    figure.suptitle(
        f"A prompt returns, on one {first['device']}, vLLM {first['vllm']}, {first['date']}"
    )
    figure.tight_layout(rect=(0, 0.13, 1, 1))


def draw_hit_rate(figure: Any, found: dict[tuple[str, str], dict[float, float]]) -> None:
    """A line for each policy."""
    axes = figure.subplots()
    for policy, (label, color, style) in POLICIES.items():
        points = sorted(found[policy].items())
        shares = range(len(points))
        axes.plot(shares, [rate for _, rate in points], style, color=color, label=label, marker="o")
    axes.set_xticks(shares, [f"{share:.0%}" for share, _ in points])
    axes.set(xlabel="size of the pool, of all distinct blocks", ylabel="share of blocks hit")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    decorate(axes)
    figure.suptitle("An hour of conversations, replayed: the trace published with Mooncake")
    figure.tight_layout()


def decorate(axes: Any) -> None:
    """What both pictures have."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["font.size"] = 9
    ttft, hit_rate = (pyplot.figure(figsize=(7.4, height)) for height in (3.4, 4.0))
    draw_ttft(ttft, whole_run(rows("ttft.csv")))
    draw_hit_rate(hit_rate, newest(rows("policies.csv")))
    ttft.savefig(RESULTS / "ttft.png", dpi=110)
    hit_rate.savefig(RESULTS / "hit_rate.png", dpi=110)


if __name__ == "__main__":
    main()
