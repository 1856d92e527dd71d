"""`kvortex trace`: record a trace of requests, or look into one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from kvortex.commands import config, outcome
from kvortex.commands.progress import note
from kvortex.commands.settings import settings_parser
from kvortex.commands.simulate import TRACE_HELP

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `trace record` and `trace info`."""
    trace = commands.add_parser(
        "trace",
        help="record a trace of requests, or look into one",
        epilog="example: kvortex trace info trace.gz",
    )
    about = trace.add_subparsers(required=True, metavar="COMMAND")
    record = about.add_parser(
        "record",
        parents=[settings_parser(without="trace_path")],
        help="print the value of vLLM's --kv-transfer-config with which it records a trace",
        epilog='example: vllm serve MODEL --kv-transfer-config "$(kvortex trace record trace.gz)"',
    )
    record.add_argument("trace_path", metavar="FILE", help="which the server writes; replaced")
    record.set_defaults(command=_record)
    info = about.add_parser(
        "info",
        help="count what is in a trace",
        epilog="example: kvortex trace info trace.gz --json",
    )
    info.add_argument("trace", type=Path, help=TRACE_HELP)
    info.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    info.set_defaults(command=_info)


def _record(arguments: argparse.Namespace) -> int:
    """As `config`; the path is made absolute, as servers are not always started from here."""
    arguments.trace_path = str(Path(arguments.trace_path).absolute())
    return config.run(arguments)


def _info(arguments: argparse.Namespace) -> int:
    from kvortex.trace import read_trace

    note(f"reading {arguments.trace}")
    facts = read_trace(arguments.trace).facts()
    if arguments.json:
        print(json.dumps(facts))
    else:
        told = {name: "not told" if value is None else value for name, value in facts.items()}
        print("\n".join(f"{name:16} {value}" for name, value in told.items()))
    return outcome.OK
