"""A vLLM engine in this process, started from a task. Of the benchmark only this imports vLLM."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NoReturn

from kvortex.core import ConfigError

if TYPE_CHECKING:
    from kvortex.benchmark.task import Task

SPARE_TOKENS = 64
"""Of the longest request, for vLLM's own look ahead."""


def open_engine(task: Task) -> Any:  # noqa: ANN401  (vLLM's LLMEngine, which is not looked into)
    """Start vLLM.

    Raises:
        ConfigError: vLLM does not know one of its arguments.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    arguments = ["--model", task.model, "--seed", "0", "--enable-prefix-caching"]
    arguments += ["--max-model-len", str(task.longest + SPARE_TOKENS), *task.vllm_arguments]
    if task.kv_transfer_config is not None:
        arguments += ["--kv-transfer-config", json.dumps(task.kv_transfer_config)]
    parser = EngineArgs.add_cli_args(_quiet_parser())
    told = EngineArgs.from_cli_args(parser.parse_args(arguments))
    config = told.create_engine_config(UsageContext.OPENAI_API_SERVER)  # whose defaults users have
    cache = config.cache_config
    if task.gpu_tokens is not None and cache.num_gpu_blocks_override is None:
        blocks = math.ceil(task.gpu_tokens / cache.block_size)
        cache.num_gpu_blocks_override = blocks + 1  # vLLM never uses one of them
    return LLMEngine.from_vllm_config(config)


def greedy(tokens: int) -> Any:  # noqa: ANN401  (vLLM's SamplingParams)
    """How every request is sampled: exactly so many tokens, each told as it comes."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=tokens,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _quiet_parser() -> Any:  # noqa: ANN401  (vLLM's FlexibleArgumentParser)
    """One that tells what is wrong instead of printing pages and leaving."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"vLLM's arguments: {message}")

    parser = FlexibleArgumentParser(add_help=False)
    parser.error = refuse
    return parser
