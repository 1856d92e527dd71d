"""Time to first token in a real vLLM on a GPU: cold, from the GPU's prefix cache, from host memory.

    python bench/bench_ttft.py MODEL_FOLDER --lengths 2048 8192 32768 --out bench/results/ttft.csv

Runs each way of offloading in a fresh process and appends one row per way and prompt length. A
folder with nothing but a config.json will do for a model: weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results import append, machine

HOST_GIB = 24
HOST_HITS = 5
SETTINGS = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def kv_transfer_config(way: str) -> dict[str, Any] | None:
    """What vLLM is given for one way of offloading."""
    if way == "none":
        return None
    if way == "kvortex":
        from kvortex import KVortexConfig

        return KVortexConfig(ram_pool_gb=HOST_GIB).kv_transfer_config()
    name = {"native": "OffloadingConnector", "simple": "SimpleCPUOffloadConnector"}[way]
    extra = {"cpu_bytes_to_use": HOST_GIB << 30}
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}


def measure(way: str, model: str, lengths: list[int]) -> list[dict[str, Any]]:
    """One row per prompt length, in this process."""
    from vllm import LLM, SamplingParams

    began = time.perf_counter()
    llm = LLM(
        model=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=max(lengths) + 4096,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=True,
        disable_log_stats=False,
        seed=0,
        kv_transfer_config=kv_transfer_config(way),
    )
    start_up = time.perf_counter() - began
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
    draw = random.Random(1)

    def ask(prompt: list[int]) -> tuple[float, int, tuple[int, ...]]:
        out = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)[0]
        tokens = tuple(out.outputs[0].token_ids)
        return out.metrics.first_token_latency, out.num_cached_tokens or 0, tokens

    ask([draw.randrange(5, 128000) for _ in range(512)])
    rows = []
    for length in lengths:
        prompt = [draw.randrange(5, 128000) for _ in range(length)]
        cold = ask(prompt)
        time.sleep(2)
        gpu_hit, host_hits = ask(prompt), []
        for _ in range(HOST_HITS):
            reset(llm)
            host_hits.append(ask(prompt))
        rows.append(_row(way, start_up, length, cold, gpu_hit, host_hits))
    return rows


def reset(llm: Any) -> None:
    """Empty the GPU's prefix cache; vLLM refuses while a store still reads from it."""
    deadline = time.monotonic() + 10
    while not llm.reset_prefix_cache():
        if time.monotonic() > deadline:
            raise TimeoutError("the prefix cache cannot be reset: what follows would be GPU hits")
        time.sleep(0.1)
    time.sleep(0.3)


def _row(
    way: str, start_up: float, length: int, cold: Any, gpu_hit: Any, host_hits: list[Any]
) -> dict[str, Any]:
    seconds = sorted(hit[0] for hit in host_hits)
    p20, _, p50, _, p80 = (
        seconds[round(q * (len(seconds) - 1))] for q in (0.2, 0.35, 0.5, 0.65, 0.8)
    )
    return {
        "way": way,
        "prompt_tokens": length,
        "start_up_s": round(start_up, 1),
        "cold_s": round(cold[0], 4),
        "gpu_hit_s": round(gpu_hit[0], 4),
        "host_hit_p20_s": round(p20, 4),
        "host_hit_p50_s": round(p50, 4),
        "host_hit_p80_s": round(p80, 4),
        "host_hit_tokens": statistics.mode(hit[1] for hit in host_hits),
        "same_output": len({cold[2], gpu_hit[2], *(hit[2] for hit in host_hits)}) == 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--ways", nargs="+", default=["none", "simple", "native", "kvortex"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--commit", default="", help="commit under test")
    parser.add_argument("--out", type=Path, default=Path("bench/results/ttft.csv"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("ROWS", json.dumps(measure(args.one, args.model, args.lengths)), flush=True)
        return
    facts = machine() | {"commit": args.commit}
    for way in args.ways:
        command = [sys.executable, __file__, args.model, "--one", way, "--lengths"]
        command += map(str, args.lengths)
        run = subprocess.run(
            command, env=os.environ | SETTINGS, stdout=subprocess.PIPE, text=True, check=False
        )
        lines = [line for line in run.stdout.splitlines() if line.startswith("ROWS ")]
        for row in json.loads(lines[-1][5:]) if lines else []:
            print(row, flush=True)
            append(args.out, facts | row)


if __name__ == "__main__":
    main()
