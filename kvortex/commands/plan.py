"""`kvortex plan`: what KVortex would hold of a model and give back how soon."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from kvortex.calibration import load_speeds
from kvortex.commands import outcome
from kvortex.config import KVortexConfig
from kvortex.core import ConfigError, Direction, shown
from kvortex.planning.attention import KV_DTYPES, attention_of
from kvortex.planning.hf_config import read_hf_config
from kvortex.planning.plan import Link, make_plan, table

if TYPE_CHECKING:
    import argparse

ASSUMED = Link(25.0, "assumed, as of PCIe 4 x16; `kvortex tune` measures it, --link-gb-s tells it")
DISK_PATH = "/var/tmp/kvortex"
BLOCK_TOKENS = 16
MOST_GPUS = 1024
MOST_BLOCK_TOKENS = 1 << 16
MOST = 1 << 20


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan`."""
    plan = commands.add_parser(
        "plan",
        help="what each tier holds of a model's KV cache, and the configuration for it",
        epilog="example: kvortex plan ~/models/Llama-3.1-8B --gpu-memory 40 --ram-pool-gb 128",
    )
    plan.add_argument("model", type=Path, help="a model's folder, or its config.json")
    plan.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="of each GPU for the KV cache, beside the weights: vLLM's log names it at start as "
        "available KV cache memory",
    )
    plan.add_argument("--ram-pool-gb", default=8.0, metavar="GB", help="host RAM (default: 8)")
    plan.add_argument("--disk-pool-gb", metavar="GB", help="of a local drive (default: none)")
    plan.add_argument("--disk-path", metavar="PATH", help=f"where (default: {DISK_PATH})")
    plan.add_argument("--tp", type=int, metavar="N", help="GPUs of tensor parallelism (default: 1)")
    plan.add_argument(
        "--kv-dtype",
        default="auto",
        choices=("auto", *KV_DTYPES),
        help="of vLLM's --kv-cache-dtype (default: as the checkpoint says)",
    )
    plan.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help=f"tokens of vLLM's blocks (default: {BLOCK_TOKENS})",
    )
    plan.add_argument(
        "--link-gb-s",
        type=float,
        metavar="GB/S",
        help="of each GPU to host memory (default: as `kvortex tune` measured here)",
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    plan.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        ConfigError: a model or a number that nothing can be said of.
    """
    _check(arguments)
    model: Path = arguments.model
    plan = make_plan(
        str(model),
        attention_of(read_hf_config(model), arguments.kv_dtype),
        _config(arguments),
        _link(arguments.link_gb_s),
        gpu_memory_gib=arguments.gpu_memory,
        tensor_parallel=arguments.tp or 1,
        block_tokens=arguments.block_size or BLOCK_TOKENS,
    )
    if arguments.json:
        print(json.dumps(plan.as_dict()))
    else:
        print(f"{table(plan)}\n\n{shlex.join(_command(arguments, plan.config))}")
    return outcome.OK


def _command(arguments: argparse.Namespace, config: KVortexConfig) -> list[str]:
    """What serves as planned: vLLM is told of GPUs and blocks what the plan was told."""
    model: Path = arguments.model
    words = ["vllm", "serve", str(model if model.is_dir() else model.parent)]
    if arguments.tp is not None:
        words += ["--tensor-parallel-size", str(arguments.tp)]
    if arguments.kv_dtype == "float32":  # which vLLM keeps of a model in it alone
        words += ["--dtype", "float32"]
    elif arguments.kv_dtype != "auto":
        words += ["--kv-cache-dtype", arguments.kv_dtype]
    if arguments.block_size is not None:
        words += ["--block-size", str(arguments.block_size)]
    return [*words, "--kv-transfer-config", json.dumps(config.kv_transfer_config())]


def _check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a number that makes no sense."""
    for option, value, most in (
        ("--gpu-memory", arguments.gpu_memory, MOST),
        ("--link-gb-s", arguments.link_gb_s, MOST),
        ("--tp", arguments.tp, MOST_GPUS),
        ("--block-size", arguments.block_size, MOST_BLOCK_TOKENS),
    ):
        if value is not None and not 0 < value <= most:
            raise ConfigError(f"{option} {shown(value)}: use a number above 0, at most {most}")


def _config(arguments: argparse.Namespace) -> KVortexConfig:
    disk = {}
    if arguments.disk_pool_gb is not None or arguments.disk_path is not None:
        disk["disk_path"] = arguments.disk_path or DISK_PATH
        disk["disk_pool_gb"] = arguments.disk_pool_gb
    return KVortexConfig(ram_pool_gb=arguments.ram_pool_gb, **disk)


def _link(told: float | None) -> Link:
    if told is not None:
        return Link(told, "as told")
    measured = load_speeds()
    if measured is None:
        return ASSUMED
    return Link(measured[Direction.LOAD], "measured by `kvortex tune`")
