"""`kvortex completion`: what a shell needs to complete commands and options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvortex.commands import outcome
from kvortex.core import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

SHELLS = ("bash", "zsh", "fish")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `completion`."""
    completion = commands.add_parser(
        "completion",
        help="print a script with which a shell completes commands and options",
        epilog="examples:\n"
        '  eval "$(kvortex completion bash)"                      # in ~/.bashrc\n'
        '  kvortex completion zsh > "${fpath[1]}/_kvortex"        # once\n'
        "  kvortex completion fish > ~/.config/fish/completions/kvortex.fish",
    )
    completion.add_argument("shell", choices=SHELLS, help="which one reads the script")
    completion.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the script; `arguments.root` is the parser of the whole command line.

    Raises:
        ConfigError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise ConfigError("shtab is not installed: pip install shtab") from None
    for action in _actions(arguments.root):
        if action.type is Path:
            action.complete = shtab.FILE
    print(shtab.complete(arguments.root, shell=arguments.shell))
    return outcome.OK


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """Arguments of a parser and of all below it; shtab reads attributes that argparse lacks."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
