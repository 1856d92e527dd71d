"""`kvortex demo`: conversations that return, served without and with KVortex."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from kvortex.commands import outcome
from kvortex.commands.settings import read_config, settings_parser
from kvortex.core import ConfigError

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo`."""
    demo = commands.add_parser(
        "demo",
        parents=[settings_parser(ram_pool_gb=1.0)],
        help="serve returning conversations in a real vLLM, without and with KVortex",
        description="Serve conversations that return after their KV was pushed out of a small KV "
        "cache, by a real vLLM with a tiny random model. Ends with 1 where nothing was restored or "
        "an output differs.",
        epilog="example: kvortex demo --json",
    )
    demo.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    demo.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was restored; 1 if KVortex did not do what it is for.

    Raises:
        ConfigError: a setting that cannot work, or something is not installed.
    """
    config = read_config(arguments)
    try:
        from kvortex.demo import run_demo
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed: pip install 'kvortex[demo,vllm]'"
        ) from None
    result = run_demo(config)
    print(json.dumps(result.as_dict()) if arguments.json else result.table())
    if not result.ok:
        what = "nothing was restored" if result.outputs_equal else "an output differs"
        print(f"kvortex: the demonstration failed: {what}", file=sys.stderr)
    return outcome.OK if result.ok else outcome.FAILED
