"""`kvortex disk`: what is under a disk_path, whether it is whole, and its removal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvortex.commands import outcome
from kvortex.commands.progress import draw

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `disk inspect`, `disk verify` and `disk clear`."""
    disk = commands.add_parser(
        "disk",
        help="look into the caches under a disk_path",
        epilog="example: kvortex disk inspect /nvme/kvortex",
    )
    about = disk.add_subparsers(required=True, metavar="COMMAND")
    for name, command, told in (
        (
            "inspect",
            _inspect,
            "namespaces, slots and ages; also of running servers; 1 if not all can be read",
        ),
        (
            "verify",
            _verify,
            "compare the checksum of every block; 0 only if all could be, and are good",
        ),
        (
            "clear",
            _clear,
            "remove all caches that are there; 1 if some are left, 2 if one is in use",
        ),
    ):
        parser = about.add_parser(
            name, help=told, epilog=f"example: kvortex disk {name} /nvme/kvortex --json"
        )
        parser.add_argument("path", type=Path, help="a disk_path of KVortex")
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.set_defaults(command=command)
        if command is _clear:
            parser.add_argument("--yes", action="store_true", help="do not ask")


def _inspect(arguments: argparse.Namespace) -> int:
    from kvortex.disk.cache_info import table
    from kvortex.disk.tool import inspect

    found = inspect(arguments.path)
    if arguments.json:
        print(json.dumps(found.as_dict()))
    elif found.caches or not found.unreadable:
        print(table(found.caches) if found.caches else f"no caches in {arguments.path}")
        for place, why in found.untried.items():
            print(f"a server may use it, nobody can tell: {place} {why}")
    _complain(found.unreadable)
    return outcome.OK if found.is_whole else outcome.FAILED


def _verify(arguments: argparse.Namespace) -> int:
    from kvortex.disk.tool import verify

    verified = verify(arguments.path, draw)
    if arguments.json:
        print(json.dumps(verified.as_dict()))
    else:
        nothing = not (verified.caches_read or verified.unreadable or verified.disturbed)
        print(f"no caches in {arguments.path}" if nothing else verified)
    _complain(verified.unreadable)
    return outcome.OK if verified.is_whole else outcome.FAILED


def _complain(unreadable: dict[str, str]) -> None:
    for place, why in unreadable.items():
        print(f"kvortex: {place} {why}", file=sys.stderr)


def _clear(arguments: argparse.Namespace) -> int:
    from kvortex.disk.tool import clear, count_caches, require_idle

    path: Path = arguments.path
    removed = count_caches(path)
    if removed:  # else nothing is touched: the folder may not be ours
        found = require_idle(path, certainly=True)
        what = f"{found.blocks} blocks" + (", and what cannot be read," if found.unreadable else "")
        if not arguments.yes and not _confirms(f"remove {what} in {path}?"):
            print("kvortex: nothing was removed", file=sys.stderr)
            return outcome.FAILED
        removed = clear(path)
    told = f"{removed} caches removed" if removed else f"no caches in {path}"
    print(json.dumps({"removed": removed}) if arguments.json else told)
    return outcome.OK


def _confirms(question: str) -> bool:
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
