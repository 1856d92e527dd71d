"""The `kvortex` command: minds ctrl-c before all else, and leaves the rest to the command line.

Little is imported above: on what comes in that time, Python itself prints a traceback.
"""

from __future__ import annotations

import os
import signal

from kvortex.commands import outcome

TYPE_CHECKING = False  # type checkers know the name, and importing `typing` takes its time
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, as `kvortex.commands.outcome` names them."""
    try:
        return _command_line()(argv)
    except KeyboardInterrupt:
        return outcome.INTERRUPTED


def _command_line() -> Callable[[Sequence[str] | None], int]:
    """Import it, which takes a while."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if usual:
            signal.signal(signal.SIGINT, _leave)
    except ValueError:  # Python lets no other thread than the main one mind signals
        usual = False
    try:
        from kvortex.commands.command_line import run
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return run


def _leave(_number: int, _frame: FrameType | None) -> None:
    """At once: what is raised in the midst of an import may be printed, or lost, by C code."""
    os._exit(outcome.INTERRUPTED)
