"""Parser: an argparse parser whose examples stay on the lines on which they were written."""

from __future__ import annotations

import argparse


class Parser(argparse.ArgumentParser):
    """Of the whole command line, and of each command: argparse takes its class for those below."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**{"formatter_class": _Formatter} | settings)  # type: ignore[arg-type]


class _Formatter(argparse.HelpFormatter):
    """A command that was broken over lines could not be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example"):
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)
