"""The command line: the parser of all commands, and how each is run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from io import TextIOWrapper
from typing import TYPE_CHECKING

from kvortex import __version__
from kvortex.commands import (
    bench,
    completion,
    config,
    demo,
    disk,
    doctor,
    outcome,
    plan,
    simulate,
    top,
    trace,
    tune,
)
from kvortex.commands.parser import Parser
from kvortex.core import ConfigError, KVortexError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

COMMANDS = (config, plan, doctor, tune, demo, bench, top, simulate, trace, disk, completion)
"""In the order in which a new user meets them."""


def run(argv: Sequence[str] | None) -> int:
    """Do what was asked; returns the exit status, as `kvortex.commands.outcome` names them.

    Raises:
        KeyboardInterrupt: by ctrl-c or SIGTERM, once what was started is ended.
    """
    arguments = make_parser().parse_args(argv)
    if isinstance(sys.stdout, TextIOWrapper):  # names of files and models may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _interrupted_by_sigterm():
            code: int = arguments.command(arguments)
            sys.stdout.flush()
    except ConfigError as error:
        return _complain(error, outcome.USAGE)
    except KVortexError as error:
        return _complain(error, outcome.FAILED)
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return outcome.FAILED
    return code


def make_parser() -> Parser:
    """Of all commands."""
    parser = Parser(
        prog="kvortex",
        description="KV cache offloading for vLLM. Commands end with 0; with 1 where something "
        "failed or is not as it should be; with 2 where they were asked wrongly; with 130 where "
        "they were interrupted. An error is one line on standard error.",
        epilog='example: vllm serve MODEL --kv-transfer-config "$(kvortex config)"',
    )
    parser.add_argument("--version", action="version", version=f"kvortex {__version__}")
    parser.set_defaults(root=parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Leave by the way of ctrl-c, on which processes that were started are ended."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread mind signals
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(error: KVortexError, code: int) -> int:
    print(f"kvortex: {error}", file=sys.stderr)
    return code
