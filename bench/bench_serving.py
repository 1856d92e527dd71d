"""Serving with a real vLLM on a GPU: without a connector, with vLLM's own two, and with KVortex.

    python bench/bench_serving.py MODEL_FOLDER --commit $(git rev-parse --short HEAD)

Each way of offloading runs in a process of its own, for each engine that the scenarios need; rows
are appended to bench/results/serving.csv, and serving.png is drawn beside it. A folder with nothing
but a config.json will do for a model: weights are random. Scenarios (`--only`):

half      prompt of 32K tokens, half of which is a host hit or a GPU hit; time to first token
one-head  prompt of 32K tokens that was seen before, with one KV head; time to first token
users     32 users with contexts of 8K tokens return twice, 8 at once, GPU memory for 4 of them
often     the same, but they return eight times
decode    time per token of 8 running requests while prompts of 8K tokens are stored and loaded
restore   8 conversations of 32K tokens return, GPU memory for one, 32 GiB of host memory

All have the same settings of vLLM and as much host memory. OffloadingConnector also stores
generated tokens (`offload_prompt_only` is off), as the others do by default. With Llama-3.1-8B's
shape 32 users have 33 GiB of KV: with less host memory, `users` also compares what is kept.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from results import append, machine
from scenarios import SCENARIOS, ScaledServing, capped_blocks, longest_request, restore

from kvortex import KVortexConfig
from kvortex.benchmark.ways import KVORTEX, WAYS, kv_transfer_config

DEFAULT_POLICY = KVortexConfig().eviction_policy
SETTINGS = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
SETUP = ("scenario", "way", "host_gib", "graphs", "scale")
COLUMNS = (*SETUP, "measure", "unit", "value", "p20", "p80", "p99", "error")
MARK = "ROWS "
RAISED = re.compile(r"(Error|Exception): ")
LINE_END = re.compile("(,|beside) ")
PANELS = {
    "half": ("s", ("first token, host hit", "first token, GPU hit")),
    "one-head": ("s", ("first token, host hit", "first token, GPU hit")),
    "users": ("requests/s", ("served",)),
    "users ": ("s", ("first token, returning",)),
    "often": ("requests/s", ("served",)),
    "often ": ("s", ("first token, returning",)),
    "decode": (
        "mean ms/token",
        ("alone", "beside new prompts", "beside GPU hits", "beside host hits"),
    ),
    "restore": ("share", ("restored",)),
}
"""What is drawn of each scenario."""


def engines(names: list[str], host_gib: float, scale: float) -> list[tuple[list[str], float]]:
    """Scenarios that can share an engine, and its host memory."""

    def needs(name: str) -> tuple[bool, bool, int, float]:
        one = SCENARIOS[name]
        return one.one_head, one.capped, one.returns, max(host_gib, one.host_gib * scale)

    groups = itertools.groupby(sorted(names, key=needs), key=needs)
    return [(list(group), gib) for (*_, gib), group in groups]


def measure(way: str, names: list[str], host_gib: float, args: argparse.Namespace) -> None:
    """Run scenarios on one engine in this process; each one's rows are a line of the output."""
    from vllm import LLM

    scenario = SCENARIOS[names[0]]
    blocks = None
    if scenario.capped:
        blocks = capped_blocks(args.scale, args.block_size, scenario.returns)
    llm = LLM(
        model=args.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=not args.graphs,
        max_model_len=longest_request(args.scale),
        max_num_batched_tokens=8192,
        max_num_seqs=32,
        block_size=args.block_size,
        num_gpu_blocks_override=blocks,
        gpu_memory_utilization=args.gpu_memory,
        enable_prefix_caching=True,
        disable_log_stats=True,
        seed=0,
        hf_overrides={"num_key_value_heads": 1} if scenario.one_head else {},
        kv_transfer_config=kv_transfer_config(
            way, KVortexConfig(ram_pool_gb=host_gib, eviction_policy=args.policy)
        ),
    )
    serving = ScaledServing(llm.llm_engine, args.scale)
    serving.ask(serving.prompt(512 if args.scale >= 1 else 64))
    for name in names:
        serving.clear()
        run = SCENARIOS[name].run
        rows = restore(serving, args.block_size) if run is restore else run(serving)
        print(f"\n{MARK}{json.dumps([{'scenario': name} | row for row in rows])}", flush=True)


def in_fresh_process(
    way: str, names: list[str], host_gib: float, limit_s: float
) -> list[dict[str, Any]]:
    """Rows of all scenarios; one with an error for each that did not end."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", way, "--only", *names]
    command += ["--host-gib", str(host_gib)]
    late = False
    try:
        ended = subprocess.run(
            command,
            env=os.environ | SETTINGS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
            check=False,
        )
        output, error = ended.stdout, f"exit status {ended.returncode}"
    except subprocess.TimeoutExpired as expired:
        late = True
        output, error = expired.stdout or b"", f"no end after {limit_s:.0f} s"
    lines = output.decode(errors="replace").splitlines()
    rows = [row for line in lines if line.startswith(MARK) for row in json.loads(line[len(MARK) :])]
    missing = [name for name in names if name not in {row["scenario"] for row in rows}]
    if missing:
        print("\n".join(lines[-60:]), file=sys.stderr)
        raised = [line for line in lines if RAISED.search(line)]
        if raised and not late:  # else vLLM's warnings would be taken for the reason
            error = raised[-1][-200:]
    return rows + [{"scenario": name, "error": error} for name in missing]


def table(rows: list[dict[str, Any]], ways: list[str]) -> str:
    """Values of all ways side by side."""
    lines = [f"{'':52}" + "".join(f"{way:>12}" for way in ways)]
    whats = dict.fromkeys((r["scenario"], r["measure"], r["unit"]) for r in rows if r["measure"])
    for what in whats:
        for column, label in (("value", ""), ("p99", " p99")):
            here = {
                r["way"]: r[column]
                for r in rows
                if (r["scenario"], r["measure"], r["unit"]) == what and r[column] != ""
            }
            if here:
                name = f"{what[0]}: {what[1]}, {what[2]}{label}"
                lines.append(f"{name:52}" + "".join(f"{here.get(way, '-'):>12}" for way in ways))
    return "\n".join(lines)


def latest(path: Path) -> list[dict[str, Any]]:
    """Of each scenario the rows that were measured last, with one setting on one machine."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = {row["scenario"]: _setting(row) for row in rows}
    newest = {
        (row["scenario"], row["way"], row["measure"], row["unit"]): row
        for row in rows
        if _setting(row) == last[row["scenario"]]
    }
    return list(newest.values())


def _setting(row: dict[str, Any]) -> list[Any]:
    return [row[column] for column in ("device", "commit", "graphs", "scale")]


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each scenario, a bar for each way; a line reaches from the median to the p99."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    ways = [way for way in WAYS if way in {row["way"] for row in rows}]
    setups = {row["scenario"]: (row["device"], row["graphs"]) for row in rows}
    figure, axes = pyplot.subplots(2, 4, figsize=(18, 7.5))
    for axis, (title, (unit, measures)) in zip(axes.flat, PANELS.items(), strict=True):
        for number, way in enumerate(ways):
            here = {
                row["measure"]: row
                for row in rows
                if (row["scenario"], row["way"], row["unit"]) == (title.strip(), way, unit)
            }
            shown = [at for at, measure in enumerate(measures) if measure in here]
            places = [at + (number - len(ways) / 2 + 0.5) * 0.8 / len(ways) for at in shown]
            values = [float(here[measures[at]]["value"]) for at in shown]
            axis.bar(places, values, width=0.75 / len(ways), color=f"C{number}")
            if unit == "s":
                high = [float(here[measures[at]]["p99"]) for at in shown]
                axis.vlines(places, values, high, color="black", linewidth=0.8)
        device, graphs = setups.get(title.strip(), ("", ""))
        how = "CUDA graphs" if graphs == "True" else "eager"
        axis.set_title(f"{title.strip()}: {device}, {how}", fontsize=9)
        axis.set(ylabel=unit, xlim=(-0.5, len(measures) - 0.5))
        axis.set_xticks(range(len(measures)), [LINE_END.sub(r"\1\n", m) for m in measures])
        axis.grid(axis="y", alpha=0.3)
    shown_ways = [Patch(color=f"C{number}", label=way) for number, way in enumerate(ways)]
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.legend(handles=shown_ways, loc="lower center", ncols=len(ways))
    figure.savefig(path, dpi=100)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--host-gib", type=float, default=24, help="host memory of each way")
    parser.add_argument("--policy", default=DEFAULT_POLICY, help="of eviction, of KVortex")
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs, not eager")
    parser.add_argument("--scale", type=float, default=1, help="of all lengths")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a KV block")
    parser.add_argument("--gpu-memory", type=float, default=0.5, help="share that vLLM may use")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one process")
    parser.add_argument("--commit", default="", help="commit under test")
    parser.add_argument("--out", type=Path, default=Path("bench/results/serving.csv"))
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.one:
        measure(args.one, args.only, args.host_gib, args)
        return
    facts = machine() | {"commit": args.commit}
    all_rows = []
    for names, host_gib in engines(args.only, args.host_gib, args.scale):
        for way in args.ways:
            other = way == KVORTEX and args.policy != DEFAULT_POLICY
            name = f"{way}, {args.policy}" if other else way
            settings = {"way": name, "host_gib": host_gib, "graphs": args.graphs}
            for found in in_fresh_process(way, names, host_gib, args.limit):
                row = settings | {"scale": args.scale} | found
                all_rows.append(facts | {column: row.get(column, "") for column in COLUMNS})
                append(args.out, all_rows[-1])
                print(*(f"{row[c]}" for c in COLUMNS if row.get(c, "") != ""), flush=True)
    print(table(all_rows, list(dict.fromkeys(row["way"] for row in all_rows))))
    picture(latest(args.out), args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
