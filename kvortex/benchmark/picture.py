"""A picture of a benchmark's report, by matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvortex.benchmark.first_token import SOURCES
from kvortex.benchmark.report import SHOWN
from kvortex.benchmark.ways import WAYS
from kvortex.picture_file import save_picture

if TYPE_CHECKING:
    from pathlib import Path

    from kvortex.benchmark.report import Report

BARS = 0.8
"""Of the distance between two groups."""


def draw(report: Report, path: Path) -> None:
    """Times to first token, a panel for each prompt length, and requests per second.

    Raises:
        ConfigError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = report.plan.lengths
    panels = len(lengths) + (report.plan.conversations is not None)
    figure, axes = pyplot.subplots(1, panels, figsize=(4 * panels, 4.5), squeeze=False)
    for axis, length in zip(axes.flat, lengths, strict=False):
        _first_tokens(axis, report, length)
    if report.plan.conversations is not None:
        _requests(axes.flat[-1], report)
    figure.suptitle(f"{report.plan.name}, {report.machine['device']}", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=len(labels))
    save_picture(figure, path)


def _first_tokens(axis: Any, report: Report, length: int) -> None:  # noqa: ANN401
    ways = list(report.measured)
    rows = {way: [t for t in report.times(way) if t.length == length] for way in ways}
    sources = [s for s in SOURCES if any(t.source == s for times in rows.values() for t in times)]
    for number, way in enumerate(ways):
        offset = (number - (len(ways) - 1) / 2) * BARS / len(ways)
        places = [sources.index(times.source) + offset for times in rows[way]]
        heights = [times.median_s * 1000 for times in rows[way]]
        axis.bar(places, heights, BARS / len(ways), color=_color(way), label=WAYS[way])
        low = [times.fastest_s * 1000 for times in rows[way]]
        high = [times.slowest_s * 1000 for times in rows[way]]
        axis.vlines(places, low, high, color="black", linewidth=0.8)
    axis.set(title=f"{length:,} tokens", ylabel="ms to first token", ylim=(0, None))
    axis.set_xticks(range(len(sources)), [SHOWN[source].replace(" ", "\n") for source in sources])
    axis.grid(axis="y", alpha=0.3)


def _requests(axis: Any, report: Report) -> None:  # noqa: ANN401
    shape = report.plan.conversations
    assert shape is not None
    for number, (way, found) in enumerate(report.measured.items()):
        if found.conversed is not None:
            rate = found.conversed.requests / found.conversed.seconds
            axis.bar([number], [rate], BARS, color=_color(way))
    axis.set(title=f"{shape.users} users of {shape.context:,} tokens", ylabel="requests/s")
    axis.set_xticks([])
    axis.grid(axis="y", alpha=0.3)


def _color(way: str) -> str:
    """The same for a way in every picture."""
    return f"C{list(WAYS).index(way)}"
