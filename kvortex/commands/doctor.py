"""`kvortex doctor`: whether this machine is fit for KVortex, and what to do if not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvortex import __version__
from kvortex.commands import outcome

if TYPE_CHECKING:
    import argparse

CLEAR_LINE = "\r\x1b[K"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `doctor`."""
    doctor = commands.add_parser(
        "doctor",
        help="look at this machine: GPU, link, memory, disk, versions; 1 if something fails",
        epilog="example: kvortex doctor --disk-path /mnt/nvme/kv",
    )
    doctor.add_argument(
        "--disk-path",
        type=Path,
        metavar="PATH",
        help="folder whose drive is measured with 256 MiB, which are gone afterwards",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    doctor.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 if something will not work."""
    from kvortex.doctor.checkup import checkup, table
    from kvortex.doctor.finding import Verdict

    findings = checkup(arguments.disk_path, _progress)
    _progress("")
    failed = any(finding.verdict is Verdict.FAIL for finding in findings)
    if arguments.json:
        told = [finding.as_dict() for finding in findings]
        print(json.dumps({"ok": not failed, "kvortex": __version__, "findings": told}))
    else:
        print(f"KVortex {__version__}\n{table(findings)}")
    return outcome.FAILED if failed else outcome.OK


def _progress(subject: str) -> None:
    """What is looked at, on a terminal, until the next is."""
    if sys.stderr.isatty():
        shown = f"looking at {subject} ..." if subject else ""
        print(f"{CLEAR_LINE}{shown}", end="", file=sys.stderr, flush=True)
