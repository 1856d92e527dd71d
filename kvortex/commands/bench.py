"""`kvortex bench`: one's own before and after, on one's own model and GPU."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvortex.commands import outcome
from kvortex.commands.progress import say
from kvortex.commands.settings import read_config, settings_parser
from kvortex.core import ConfigError
from kvortex.picture_file import require_picture

if TYPE_CHECKING:
    import argparse

    from kvortex.benchmark.plan import Plan
    from kvortex.benchmark.task import Conversations

MODEL_PROMPTS, TINY_PROMPTS = [2048, 8192], [512, 2048]
MODEL_CONTEXT, TINY_CONTEXT = 8192, 1024
AT_ONCE = 8
TINY_MODEL = "tiny random model"
TINY_ARGUMENTS = (
    *("--dtype", "float32"),  # so that no rounding decides which token is likeliest
    *("--enforce-eager", "--block-size", "32"),
    *("--kv-cache-memory-bytes", str(256 << 20)),
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench`."""
    bench = commands.add_parser(
        "bench",
        parents=[settings_parser(without="trace_path")],
        help="measure time to first token and throughput without and with KVortex",
        description="Measure what KVortex is worth on this machine, without a running server: time "
        "to first token of a prompt that is computed, and that comes from the GPU, from host "
        "memory and, with --disk-path, from disk after a restart; then requests per second of "
        "users who return to a GPU that cannot hold them all. Every vLLM runs in a process of its "
        "own. Ends with 1 where something failed, a hit was none, or an output differs.",
        epilog="examples:\n"
        "  kvortex bench\n"
        "  kvortex bench --model meta-llama/Llama-3.1-8B-Instruct --ram-pool-gb 32 --plot b.png\n"
        "  kvortex bench --model ./model --compare simple -- --tensor-parallel-size 2",
    )
    _add_options(bench)
    bench.set_defaults(command=run, trace_path=None)


def _add_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--model", help="folder or name (default: a tiny random one, made here)")
    bench.add_argument(
        "--prompt-tokens",
        type=int,
        nargs="+",
        metavar="N",
        help=f"lengths of prompts (default: {' '.join(map(str, MODEL_PROMPTS))}; of the tiny "
        f"model {' '.join(map(str, TINY_PROMPTS))})",
    )
    bench.add_argument("--repeats", type=int, default=3, metavar="N", help="of each (default: 3)")
    bench.add_argument(
        "--users", type=int, default=8, metavar="N", help="who return; 0 is none (default: 8)"
    )
    bench.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens with which each begins (default: {MODEL_CONTEXT}, tiny {TINY_CONTEXT})",
    )
    bench.add_argument(
        "--users-on-gpu",
        type=int,
        default=2,
        metavar="N",
        help="how many the GPU's KV cache is held down to; 0 leaves it to vLLM (default: 2)",
    )
    bench.add_argument(
        "--compare",
        nargs="+",
        default=[],
        choices=("simple", "native"),
        help="also vLLM's SimpleCPUOffloadConnector or OffloadingConnector, with as much memory",
    )
    bench.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    bench.add_argument("--plot", type=Path, metavar="PNG", help="draw what was measured")
    bench.add_argument(
        "vllm_arguments",
        nargs="*",
        metavar="-- VLLM_ARGUMENT",
        help="for every vLLM, like --gpu-memory-utilization 0.5 --enforce-eager "
        "--load-format dummy",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if its figures may not be believed.

    Raises:
        ConfigError: a setting that cannot work, or something is not installed.
    """
    if arguments.plot is not None:
        require_picture(arguments.plot)
    with tempfile.TemporaryDirectory(prefix="kvortex-bench-") as folder:
        plan = _plan(arguments, Path(folder))
        from kvortex.benchmark.machine import machine
        from kvortex.benchmark.report import Report
        from kvortex.benchmark.table import table

        report = Report(plan, machine(), *plan.carry_out(say))
    print(json.dumps(report.as_dict()) if arguments.json else table(report))
    if arguments.plot is not None and report.measured:
        from kvortex.benchmark.picture import draw

        draw(report, arguments.plot)
    problems = report.problems()
    for problem in problems:
        print(f"kvortex: {problem}", file=sys.stderr)
    return outcome.FAILED if problems else outcome.OK


def _plan(arguments: argparse.Namespace, folder: Path) -> Plan:
    """Raises ConfigError for what cannot be measured."""
    from kvortex.benchmark.plan import Plan
    from kvortex.benchmark.ways import KVORTEX, NONE
    from kvortex.doctor.versions import installed_vllm
    from kvortex.doubts import require_this_machine

    config = read_config(arguments)
    conversations = _conversations(arguments)
    lengths = arguments.prompt_tokens or (MODEL_PROMPTS if arguments.model else TINY_PROMPTS)
    for option, least, numbers in (
        ("--prompt-tokens", 64, lengths),
        ("--repeats", 1, [arguments.repeats]),
        ("--users-on-gpu", 0, [arguments.users_on_gpu]),
    ):
        _require(option, least, numbers)
    if installed_vllm() is None:
        raise ConfigError("vLLM is not installed: pip install 'kvortex[vllm]'")
    require_this_machine(config)
    model, extra = arguments.model, tuple(arguments.vllm_arguments)
    if model is None:
        model, extra = _make_tiny_model(folder / "tiny"), TINY_ARGUMENTS + extra
    elif Path(model).exists():  # else it is a name; each vLLM runs in a folder of its own
        model = Path(model).absolute()
    elif model.startswith((".", "/", "~")):
        raise ConfigError(f"--model {model}: there is no such folder")
    return Plan(
        name=arguments.model or TINY_MODEL,
        model=str(model),
        config=config,
        ways=(NONE, KVORTEX, *dict.fromkeys(arguments.compare)),
        lengths=tuple(dict.fromkeys(lengths)),
        repeats=arguments.repeats,
        conversations=conversations,
        users_on_gpu=arguments.users_on_gpu,
        vllm_arguments=extra,
    )


def _conversations(arguments: argparse.Namespace) -> Conversations | None:
    from kvortex.benchmark.task import Conversations

    context = arguments.context
    if context is None:
        context = MODEL_CONTEXT if arguments.model else TINY_CONTEXT
    _require("--users", 0, [arguments.users])
    _require("--context", 64, [context])
    if not arguments.users:
        return None
    at_once = arguments.users_on_gpu or AT_ONCE  # more would wait for each other, not for us
    return Conversations(arguments.users, context, at_once)


def _require(option: str, least: int, numbers: list[int]) -> None:
    for number in numbers:
        if number < least:
            raise ConfigError(f"{option} {number}: use {least} or more")


def _make_tiny_model(folder: Path) -> Path:
    try:
        from kvortex.tiny_model import make_tiny_model

        say("making a tiny random model")
        make_tiny_model(folder)
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'kvortex[demo]'") from None
    return folder
