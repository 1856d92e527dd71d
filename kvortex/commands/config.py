"""`kvortex config`: the value of vLLM's --kv-transfer-config."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from kvortex.commands import outcome
from kvortex.commands.settings import read_config, settings_parser
from kvortex.doubts import doubts

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `config`."""
    config = commands.add_parser(
        "config",
        parents=[settings_parser()],
        help="print the value of vLLM's --kv-transfer-config",
        description="Print the value of vLLM's --kv-transfer-config, in JSON. What a server on "
        "this machine would refuse or warn of is told on standard error: there may be another "
        "for it.",
        epilog='example: vllm serve MODEL --kv-transfer-config "$(kvortex config --ram-pool-gb 8)"',
    )
    config.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print it as JSON, and warn of what this machine lacks.

    Raises:
        ConfigError: a setting that cannot work on any machine.
    """
    config = read_config(arguments)
    for doubt in doubts(config):
        print(f"kvortex: on this machine: {doubt}", file=sys.stderr)
    print(json.dumps(config.kv_transfer_config()))
    return outcome.OK
