"""`kvortex config`: the value of vLLM's --kv-transfer-config."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from kvortex.commands import outcome
from kvortex.commands.settings import read_config, settings_parser

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `config`."""
    config = commands.add_parser(
        "config",
        parents=[settings_parser()],
        help="print the value of vLLM's --kv-transfer-config",
        epilog='example: vllm serve MODEL --kv-transfer-config "$(kvortex config --ram-pool-gb 8)"',
    )
    config.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print it as JSON.

    Raises:
        ConfigError: a setting that cannot work.
    """
    print(json.dumps(read_config(arguments).kv_transfer_config()))
    return outcome.OK
