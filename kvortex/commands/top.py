"""`kvortex top`: a live view of what KVortex does for a running server."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from typing import TYPE_CHECKING

from kvortex.commands import outcome
from kvortex.core import ConfigError
from kvortex.scrape import metrics_url, scrape
from kvortex.top import View

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""Of the terminal's second screen, without a cursor."""
HOME, TO_END_OF_LINE, TO_END = "\x1b[H", "\x1b[K", "\x1b[J"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `top`."""
    top = commands.add_parser(
        "top",
        help="watch hits, misses by reason, transfers and failures of a running server",
        description="Watch a running vLLM server, by its /metrics. Ends with ctrl-c, or with 1 "
        "where the server is gone or serves without KVortex.",
        epilog="example: kvortex top http://localhost:8000 --once --json",
    )
    top.add_argument("url", metavar="URL", help="of the server, like http://localhost:8000")
    top.add_argument(
        "--interval",
        type=float,
        default=2.0,
        metavar="S",
        help="seconds between views (default: %(default)s)",
    )
    top.add_argument(
        "--once", action="store_true", help="print one view, of what was since the server's start"
    )
    top.add_argument("--json", action="store_true", help="print one JSON object a line")
    top.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Show views until there is a reason to end.

    Raises:
        ConfigError: an interval that makes no sense.
        ScrapeError: there is nothing to watch.
    """
    interval: float = arguments.interval
    if not (math.isfinite(interval) and interval > 0):
        raise ConfigError(f"--interval {interval:g}: use a number of seconds above 0")
    views = _views(arguments.url, interval)
    if arguments.once:
        _print(next(views), arguments.json)
    elif arguments.json or not sys.stdout.isatty():
        for view in views:
            _print(view, arguments.json)
    else:
        _watch(views, metrics_url(arguments.url), interval)
    return outcome.OK


def _views(url: str, interval: float) -> Iterator[View]:
    before = None
    while True:
        now = scrape(url)
        yield View.of(now, before)
        before = now
        time.sleep(interval)


def _print(view: View, as_json: bool) -> None:
    text = json.dumps(view.as_dict()) if as_json else "\n".join([*view.lines(), ""])
    print(text, flush=True)


def _watch(views: Iterator[View], where: str, interval: float) -> None:
    """Draw each view over the last; ctrl-c is how it ends."""
    first = next(views)  # so that an error is told on the screen that stays
    print(ENTER, end="")
    try:
        with contextlib.suppress(KeyboardInterrupt):
            _draw(first, where, interval)
            for view in views:
                _draw(view, where, interval)
    finally:
        print(LEAVE, end="", flush=True)


def _draw(view: View, where: str, interval: float) -> None:
    size = shutil.get_terminal_size()
    title = f"kvortex top  {where}  {time.strftime('%H:%M:%S')}, every {interval:g} s"
    lines = [line[: size.columns] for line in [title, *view.lines()]][: size.lines - 1]
    shown = "".join(f"{line}{TO_END_OF_LINE}\n" for line in lines)
    print(f"{HOME}{shown}{TO_END}", end="", flush=True)
