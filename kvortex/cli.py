"""The `kvortex` command."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from kvortex import __version__
from kvortex.commands import doctor, plan, top
from kvortex.config import KVortexConfig
from kvortex.core import ConfigError, KVortexError, TransferError
from kvortex.plugins import load_admission, load_policy, policy_names

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
TRACE_HELP = "JSON lines with hash_ids and input_length, or a trace that KVortex recorded"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (it failed) or 2 (it was asked wrongly)."""
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, TextIOWrapper):  # names of files and models may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
    except ConfigError as error:
        return _complain(error, EXIT_USAGE)
    except KVortexError as error:
        return _complain(error, EXIT_FAILED)
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvortex", description="KV cache offloading for vLLM.")
    parser.add_argument("--version", action="version", version=f"kvortex {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    config = commands.add_parser(
        "config",
        parents=[_settings_parser()],
        help="print the value of vLLM's --kv-transfer-config",
        epilog='vllm serve MODEL --kv-transfer-config "$(kvortex config --ram-pool-gb 32)"',
    )
    config.set_defaults(command=_config)

    demo = commands.add_parser(
        "demo",
        parents=[_settings_parser(ram_pool_gb=1.0)],
        help="serve returning conversations in a real vLLM, without and with KVortex",
    )
    demo.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    demo.set_defaults(command=_demo)

    _add_simulate_parser(commands)
    _add_trace_parsers(commands)
    _add_disk_parsers(commands)
    plan.add_parser(commands)
    doctor.add_parser(commands)

    tune = commands.add_parser(
        "tune",
        help="measure which way of copying is fastest on this machine, and keep the result",
        epilog="kvortex tune --device 0",
    )
    tune.add_argument("--device", type=int, default=0, help="number of the GPU (default: 0)")
    tune.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    tune.set_defaults(command=_tune)

    top.add_parser(commands)
    return parser


def _add_simulate_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    simulate = commands.add_parser(
        "simulate",
        help="replay a trace of requests through eviction policies",
        epilog="kvortex simulate trace.jsonl --policy lru lru_freq --admission adaptive",
    )
    simulate.add_argument("trace", type=Path, help=TRACE_HELP)
    simulate.add_argument("--policy", nargs="+", metavar="P", help="default: all, and the optimum")
    simulate.add_argument(
        "--capacity",
        default="1%,5%,10%,25%",
        help="blocks, shares of the distinct blocks, or sizes like 64GiB, with commas "
        "(default: 1%%,5%%,10%%,25%%)",
    )
    simulate.add_argument("--disk", metavar="CAPACITY", help="of a second tier behind the host")
    simulate.add_argument(
        "--block-bytes", metavar="SIZE", help="of a block, for sizes where the trace does not tell"
    )
    simulate.add_argument("--admission", default="always", help="default: %(default)s")
    simulate.add_argument(
        "--prefill-tokens-per-s", type=_speed, help="adds the seconds of prefill that were saved"
    )
    simulate.add_argument("--json", action="store_true", help="one JSON object a line")
    simulate.add_argument("--plot", type=Path, metavar="PNG", help="draw hit rate against capacity")
    simulate.set_defaults(command=_simulate)


def _add_trace_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    trace = commands.add_parser("trace", help="record a trace of requests, or look into one")
    about = trace.add_subparsers(required=True, metavar="COMMAND")
    record = about.add_parser(
        "record",
        parents=[_settings_parser(without="trace_path")],
        help="print the value of vLLM's --kv-transfer-config with which it records a trace",
        epilog='vllm serve MODEL --kv-transfer-config "$(kvortex trace record trace.gz)"',
    )
    record.add_argument("trace_path", metavar="FILE", help="which the server writes; replaced")
    record.set_defaults(command=_trace_record)
    info = about.add_parser("info", help="count what is in a trace")
    info.add_argument("trace", type=Path, help=TRACE_HELP)
    info.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    info.set_defaults(command=_trace_info)


def _add_disk_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    disk = commands.add_parser("disk", help="look into the caches under a disk_path")
    about = disk.add_subparsers(required=True, metavar="COMMAND")
    inspect = about.add_parser(
        "inspect", help="namespaces, slots and ages; also of running servers"
    )
    verify = about.add_parser("verify", help="compare the checksum of every block; 1 if one is bad")
    clear = about.add_parser("clear", help="remove all caches that are there, if none is in use")
    clear.add_argument("--yes", action="store_true", help="do not ask")
    for parser, command in (
        (inspect, _disk_inspect),
        (verify, _disk_verify),
        (clear, _disk_clear),
    ):
        parser.add_argument("path", type=Path, help="a disk_path of KVortex")
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.set_defaults(command=command)


def _settings_parser(without: str = "", **defaults: float) -> argparse.ArgumentParser:
    """One option for each setting but one; their values are checked by KVortexConfig."""
    parser = argparse.ArgumentParser(add_help=False)
    for name, field in KVortexConfig.model_fields.items():
        if name == without:
            continue
        parser.add_argument(
            "--" + name.replace("_", "-"),
            default=defaults.get(name, field.default),
            metavar=name.rpartition("_")[2].upper(),
            help=f"{field.description} (default: %(default)s)",
        )
    return parser


def _speed(text: str) -> float:
    if not 0 < (speed := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no speed above 0")
    return speed


def _read_config(arguments: argparse.Namespace) -> KVortexConfig:
    config = KVortexConfig(
        **{name: getattr(arguments, name) for name in KVortexConfig.model_fields}
    )
    load_policy(config.eviction_policy, capacity=1)
    load_admission(config.admission, capacity=1)
    return config


def _config(arguments: argparse.Namespace) -> int:
    print(json.dumps(_read_config(arguments).kv_transfer_config()))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    config = _read_config(arguments)
    try:
        from kvortex.demo import run_demo
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed: pip install 'kvortex[demo,vllm]'"
        ) from None
    signal.signal(signal.SIGTERM, _interrupt)
    result = run_demo(config)
    print(json.dumps(result.as_dict()) if arguments.json else result.table())
    if not result.ok:
        what = "nothing was restored" if result.outputs_equal else "an output differs"
        print(f"kvortex: the demonstration failed: {what}", file=sys.stderr)
    return 0 if result.ok else EXIT_FAILED


def _tune(arguments: argparse.Namespace) -> int:
    import torch

    count = torch.cuda.device_count() if torch.version.hip is None else 0
    if arguments.device not in range(count):
        raise ConfigError(
            f"--device {arguments.device}: torch can use {count} NVIDIA GPUs on this machine; "
            + (f"use 0 to {count - 1}" if count else "there is nothing to measure without one")
        )
    from kvortex.calibration import machine_key, save_calibration
    from kvortex.tune import speeds, table, tune

    device = torch.device("cuda", arguments.device)
    with torch.cuda.device(device):
        try:
            calibration, rows = tune(device, _print_progress)
        except torch.OutOfMemoryError:
            raise TransferError("the GPU has no GiB of memory free to measure with") from None
    if arguments.json:
        told = [asdict(row) | {"direction": row.direction.value} for row in rows]
        print(json.dumps({"machine": machine_key(device), "rows": told}))
    else:
        print(f"{machine_key(device)}\n{table(rows, calibration)}")
    try:
        kept = save_calibration(device, calibration, speeds(rows))
        print(f"kept in {kept}", file=sys.stderr)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"the result cannot be kept ({error}); set XDG_CACHE_HOME") from None
    return 0


def _simulate(arguments: argparse.Namespace) -> int:
    from kvortex.simulation import plot, require_plot, simulate, table
    from kvortex.simulator import CLAIRVOYANT

    if arguments.plot is not None:
        require_plot(arguments.plot)
    outcomes = simulate(
        arguments.trace,
        arguments.policy or [*policy_names(), CLAIRVOYANT],
        arguments.capacity.split(","),
        arguments.admission,
        _print_progress,
        arguments.disk,
        arguments.block_bytes,
    )
    if arguments.json:
        print("\n".join(json.dumps(outcome.as_dict()) for outcome in outcomes))
    else:
        print(table(outcomes, arguments.prefill_tokens_per_s))
    if arguments.plot is not None:
        plot(outcomes, arguments.plot)
    return 0


def _trace_record(arguments: argparse.Namespace) -> int:
    """As `config`; the path is made absolute, as servers are not always started from here."""
    arguments.trace_path = str(Path(arguments.trace_path).absolute())
    return _config(arguments)


def _trace_info(arguments: argparse.Namespace) -> int:
    from kvortex.trace import read_trace

    facts = read_trace(arguments.trace).facts()
    if arguments.json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{name:16} {value}" for name, value in facts.items()))
    return 0


def _disk_inspect(arguments: argparse.Namespace) -> int:
    from kvortex.disk.tool import inspect, table

    infos = inspect(arguments.path)
    if arguments.json:
        print(json.dumps({"caches": [info.as_dict() for info in infos]}))
    else:
        print(table(infos) if infos else f"no caches in {arguments.path}")
    return 0


def _disk_verify(arguments: argparse.Namespace) -> int:
    from kvortex.disk.tool import verify

    verified = verify(arguments.path, _draw_progress)
    if arguments.json:
        print(json.dumps(verified.as_dict()))
    else:
        print(f"{verified.good} blocks are good, {verified.corrupt} are corrupt")
    return EXIT_FAILED if verified.corrupt else 0


def _disk_clear(arguments: argparse.Namespace) -> int:
    from kvortex.disk.tool import clear, inspect

    blocks = sum(info.used for info in inspect(arguments.path))
    if not arguments.yes and not _confirms(f"remove {blocks} blocks in {arguments.path}?"):
        print("kvortex: nothing was removed", file=sys.stderr)
        return EXIT_FAILED
    removed = clear(arguments.path)
    print(json.dumps({"removed": removed}) if arguments.json else f"{removed} caches removed")
    return 0


def _confirms(question: str) -> bool:
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _draw_progress(done: int, total: int) -> None:
    """A bar, where there is a terminal, at most a hundred times."""
    if sys.stderr.isatty() and (done == total or done * 100 // total > (done - 1) * 100 // total):
        filled = 40 * done // total
        end = "\n" if done == total else ""
        print(f"\r[{'#' * filled:40}] {done} of {total}", end=end, file=sys.stderr, flush=True)


def _print_progress(line: str) -> None:
    print(f"[kvortex] {line}", file=sys.stderr, flush=True)


def _interrupt(_number: int, _frame: object) -> None:
    """Leave by the way of ctrl-c, on which servers that were started are ended."""
    raise KeyboardInterrupt


def _complain(error: KVortexError, code: int) -> int:
    print(f"kvortex: {error}", file=sys.stderr)
    return code
