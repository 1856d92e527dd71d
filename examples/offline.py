"""Batch inference with a host pool: documents that many questions are asked about.

    python offline.py MODEL --ram-pool-gb 8

The second round of questions comes after the GPU has forgotten the documents; KVortex brings them
back. `--llm` takes further arguments of vLLM's LLM, as JSON.
"""

from __future__ import annotations

import argparse
import json
import time

from vllm import LLM, SamplingParams

from kvortex import KVortexConfig

TOPICS = ("rivers", "bridges", "clocks", "looms")
QUESTIONS = ("What is it about? ", "Who wrote it? ")


def document(topic: str) -> str:
    """Stands for a text of yours that many prompts begin with."""
    return " ".join(
        f"Of {topic}, chapter {number}: they were made long ago." for number in range(25)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--ram-pool-gb", type=float, default=8.0)
    parser.add_argument("--llm", type=json.loads, default={}, metavar="JSON")
    arguments = parser.parse_args()

    config = KVortexConfig(ram_pool_gb=arguments.ram_pool_gb)
    llm = LLM(
        model=arguments.model, kv_transfer_config=config.kv_transfer_config(), **arguments.llm
    )
    sampling = SamplingParams(temperature=0, max_tokens=16)
    for question in QUESTIONS:
        began = time.perf_counter()
        # The document comes first and the question last: only a common beginning can be restored.
        answers = llm.generate([document(topic) + question for topic in TOPICS], sampling)
        took = time.perf_counter() - began
        asked = sum(len(answer.prompt_token_ids or ()) for answer in answers)
        cached = sum(answer.num_cached_tokens or 0 for answer in answers)
        print(f"{question}{asked} tokens of prompts, {cached} from a cache, {took:.1f} s")
        forget_on_gpu(llm)


def forget_on_gpu(llm: LLM) -> None:
    """Only for this example, whose documents would fit: in service the GPU forgets by itself."""
    deadline = time.monotonic() + 10
    while not llm.reset_prefix_cache():  # vLLM refuses while a store still reads its blocks
        if time.monotonic() > deadline:
            raise TimeoutError("the GPU's prefix cache cannot be reset")
        llm.generate(["."], SamplingParams(max_tokens=1))


if __name__ == "__main__":
    main()
