"""Parser: an argparse parser whose examples stay whole, and whose errors are of one line."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NoReturn

from kvortex.commands import outcome

if TYPE_CHECKING:
    from collections.abc import Sequence


class Parser(argparse.ArgumentParser):
    """Of the whole command line, and of each command: argparse takes its class for those below."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**{"formatter_class": _Formatter} | settings)  # type: ignore[arg-type]

    def parse_known_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuse what is left over here, so that the command at fault is named, not `kvortex`."""
        parsed, extra = super().parse_known_args(args, namespace)
        if extra:
            self.error(f"unrecognized arguments: {' '.join(extra)}")
        return parsed, extra

    def error(self, message: str) -> NoReturn:
        """End in one line, where argparse would print the usage above it."""
        self.exit(outcome.USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Formatter(argparse.HelpFormatter):
    """A command that was broken over lines could not be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example"):
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)
