"""Time to first token in a real vLLM on a GPU: cold, from the GPU's prefix cache, from host memory.

    python bench/bench_ttft.py MODEL_FOLDER --lengths 2048 8192 32768 --out bench/results/ttft.csv

As `kvortex bench` measures it, each way of offloading in a fresh process; one row per way and
prompt length is appended. A folder with nothing but a config.json will do for a model: weights are
random.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import append, machine

from kvortex import KVortexConfig
from kvortex.benchmark.first_token import COLD, GPU, HOST
from kvortex.benchmark.run import run_task
from kvortex.benchmark.task import BenchmarkError, Task
from kvortex.benchmark.ways import KVORTEX, NATIVE, NONE, SIMPLE, kv_transfer_config

if TYPE_CHECKING:
    from kvortex.benchmark.measured import Measured

HOST_GIB = 24
REPEATS = 5
VLLM_ARGUMENTS = (
    *("--load-format", "dummy", "--skip-tokenizer-init", "--enforce-eager"),
    *("--max-num-batched-tokens", "8192", "--gpu-memory-utilization", "0.5"),
)


def row(way: str, length: int, found: Measured) -> dict[str, Any]:
    """Medians, and of host hits quantiles."""
    seconds = {
        source: sorted(sample.seconds for sample in found.of(length, source))
        for source in (COLD, GPU, HOST)
    }
    hits = seconds[HOST] or seconds[COLD]  # without a connector what returns is computed
    p20, p50, p80 = (hits[round(q * (len(hits) - 1))] for q in (0.2, 0.5, 0.8))
    samples = [sample for sample in found.samples if sample.length == length]
    answers = {(sample.prompt, sample.answer) for sample in samples}
    tokens = [sample.host_tokens for sample in found.of(length, HOST)]
    return {
        "way": way,
        "prompt_tokens": length,
        "start_up_s": round(found.start_up_s, 1),
        "cold_s": round(statistics.median(seconds[COLD]), 4),
        "gpu_hit_s": round(statistics.median(seconds[GPU]), 4),
        "host_hit_p20_s": round(p20, 4),
        "host_hit_p50_s": round(p50, 4),
        "host_hit_p80_s": round(p80, 4),
        "host_hit_tokens": statistics.mode(tokens or [0]),
        "same_output": len(answers) == REPEATS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--ways", nargs="+", default=[NONE, SIMPLE, NATIVE, KVORTEX])
    parser.add_argument(
        "--verify", nargs="+", default=["always"], help="of kvortex, each in a process of its own"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--commit", default="", help="commit under test")
    parser.add_argument("--out", type=Path, default=Path("bench/results/ttft.csv"))
    args = parser.parse_args()
    facts = machine() | {"commit": args.commit}
    ways = [(way, mode) for way in args.ways for mode in (args.verify if way == KVORTEX else [""])]
    for way, mode in ways:
        config = KVortexConfig(ram_pool_gb=HOST_GIB, verify=mode or "always")
        name = f"{way}, verify={mode}" if mode not in {"", "always"} else way
        task = Task(
            model=str(Path(args.model).absolute()),
            kv_transfer_config=kv_transfer_config(way, config),
            vllm_arguments=VLLM_ARGUMENTS,
            lengths=tuple(args.lengths),
            repeats=REPEATS,
        )
        try:
            print(name, file=sys.stderr)
            found = run_task(task, lambda line: print(f"  {line}", file=sys.stderr))
        except BenchmarkError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        for length in args.lengths:
            measured = row(name, length, found)
            print(measured, flush=True)
            append(args.out, facts | measured)


if __name__ == "__main__":
    main()
