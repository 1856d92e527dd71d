"""The table of a benchmark's report, for a person's eyes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvortex import __version__
from kvortex.benchmark.first_token import COLD, DISK, HOST, SOURCES
from kvortex.benchmark.report import ENOUGH, SHOWN, figures
from kvortex.benchmark.ways import KVORTEX, NONE, WAYS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvortex.benchmark.report import Report, Times


def table(report: Report) -> str:
    """For a person's eyes: a column for each way."""
    ways = list(report.measured)
    rows = [["time to first token", *(WAYS[way] for way in ways)], *_first_tokens(report, ways)]
    if report.plan.conversations is not None and ways:
        rows += [[""] * (len(ways) + 1), *_conversations(report, ways)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(ways) + 1)]
    lines = [
        f"{row[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    parts = [_head(report), "\n".join(line.rstrip() for line in lines), *_summary(report)]
    return "\n\n".join(parts)


def _summary(report: Report) -> Iterator[str]:
    """In a sentence, what the longest prompt gains by KVortex where it returns."""
    if KVORTEX not in report.measured:
        return
    longest = max(report.plan.lengths)
    times = _by_source(report, KVORTEX, longest)
    hits = {
        SHOWN[source].removesuffix(" hit"): each.median_s
        for source, each in times.items()
        if source in {HOST, DISK} and each.share >= ENOUGH
    }
    if not hits:
        return
    # What the user has today is vLLM alone: what KVortex adds to computing is no part of a gain.
    alone = _by_source(report, NONE, longest) if NONE in report.measured else {}
    before = alone.get(COLD, times[COLD]).median_s
    gains = [f"{before / after:.1f} times as soon from {tier}" for tier, after in hits.items()]
    yield f"A prompt of {longest:,} tokens that returns begins {', '.join(gains)}."
    # A server, though, compares with what it computes itself.
    slower = [tier for tier, after in hits.items() if after > times[COLD].median_s]
    if slower and report.plan.config.load == "auto":
        yield (
            f"From {' and '.join(slower)} that takes longer than to compute it: a server computes "
            "it instead, once it has seen both."
        )


def _by_source(report: Report, way: str, length: int) -> dict[str, Times]:
    return {each.source: each for each in report.times(way) if each.length == length}


def _head(report: Report) -> str:
    facts = report.machine
    config = report.plan.config
    pools = f"{config.ram_pool_gb:g} GiB of host memory"
    if config.disk_pool_gb is not None:
        pools += f", {config.disk_pool_gb:g} GiB of {config.disk_path}"
    first = next(iter(report.measured.values()), None)
    if first is not None:
        pools = f"KV cache of {first.gpu_tokens:,} tokens on the GPU, {pools}"
    return (
        f"KVortex {__version__}, vLLM {facts['vllm']}, {facts['device']}, {facts['date']}\n"
        f"{report.plan.name}: {pools}; medians of {report.plan.repeats}"
    )


def _first_tokens(report: Report, ways: list[str]) -> Iterator[list[str]]:
    cells = {
        (times.length, times.source, way): _cell(times)
        for way in ways
        for times in report.times(way)
    }
    for length in report.plan.lengths:
        for source in SOURCES:
            shown = [cells.get((length, source, way), "-") for way in ways]
            if set(shown) != {"-"}:
                yield [f"  {length:6,} tokens, {SHOWN[source]}", *shown]


def _conversations(report: Report, ways: list[str]) -> Iterator[list[str]]:
    shape = report.plan.conversations
    assert shape is not None
    found = [report.measured[way].conversed for way in ways]
    yield [f"{shape.users} users of {shape.context:,} tokens return", *("" for _ in ways)]
    columns = [figures(each) if each else [] for each in found]
    for number, (_, name, _) in enumerate(next(filter(None, columns), [])):
        yield [f"  {name}", *(f"{f[number][2]:.4g}" if f else "-" for f in columns)]
    shares = [report.equal_answers(way) for way in ways]
    if KVORTEX in ways and any(share is not None for share in shares):
        yield [
            "  users with the same answers",
            *("-" if share is None else f"{share:.0%}" for share in shares),
        ]


def _cell(times: Times) -> str:
    """Milliseconds; and what it was, if not what it should be."""
    shown = f"{times.median_s * 1000:.1f} ms"
    if times.source == COLD or times.share >= ENOUGH:
        return shown
    return f"{shown} ({times.share:.0%}, {times.why_not})"
