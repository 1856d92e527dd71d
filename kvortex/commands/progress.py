"""Progress of commands, on standard error, so that standard output can be piped."""

from __future__ import annotations

import sys

BAR = 40


def say(line: str) -> None:
    """One line."""
    print(f"[kvortex] {line}", file=sys.stderr, flush=True)


def note(line: str) -> None:
    """One line, for those who wait at a terminal only."""
    if sys.stderr.isatty():
        say(line)


def draw(done: int, total: int) -> None:
    """A bar, where there is a terminal, at most a hundred times."""
    if sys.stderr.isatty() and (done == total or done * 100 // total > (done - 1) * 100 // total):
        filled = BAR * done // total
        end = "\n" if done == total else ""
        bar = f"\r[{'#' * filled:{BAR}}] {done} of {total}"
        print(bar, end=end, file=sys.stderr, flush=True)
