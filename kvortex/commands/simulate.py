"""`kvortex simulate`: what each eviction policy would have hit of a trace."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from kvortex.commands import outcome
from kvortex.commands.progress import note, say
from kvortex.picture_file import require_picture
from kvortex.plugins import policy_names

TRACE_HELP = "JSON lines with hash_ids and input_length, or a trace that KVortex recorded"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `simulate`."""
    simulate = commands.add_parser(
        "simulate",
        help="replay a trace of requests through eviction policies",
        epilog="example: kvortex simulate trace.jsonl --policy lru lru_freq --admission adaptive",
    )
    simulate.add_argument("trace", type=Path, help=TRACE_HELP)
    simulate.add_argument("--policy", nargs="+", metavar="P", help="default: all, and the optimum")
    simulate.add_argument(
        "--capacity",
        default="1%,5%,10%,25%",
        help="blocks, shares of the distinct blocks, or sizes like 64GiB, with commas "
        "(default: 1%%,5%%,10%%,25%%)",
    )
    simulate.add_argument("--disk", metavar="CAPACITY", help="of a second tier behind the host")
    simulate.add_argument(
        "--block-bytes", metavar="SIZE", help="of a block, for sizes where the trace does not tell"
    )
    simulate.add_argument("--admission", default="always", help="default: %(default)s")
    simulate.add_argument(
        "--prefill-tokens-per-s", type=_speed, help="adds the seconds of prefill that were saved"
    )
    simulate.add_argument("--json", action="store_true", help="one JSON object a line")
    simulate.add_argument("--plot", type=Path, metavar="PNG", help="draw hit rate against capacity")
    simulate.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a row for each policy and capacity.

    Raises:
        ConfigError: a trace, a name or a capacity that is none.
    """
    from kvortex.simulation import plot, simulate, table
    from kvortex.simulator import CLAIRVOYANT

    if arguments.plot is not None:
        require_picture(arguments.plot)
    note(f"reading {arguments.trace}")
    outcomes = simulate(
        arguments.trace,
        arguments.policy or [*policy_names(), CLAIRVOYANT],
        arguments.capacity.split(","),
        arguments.admission,
        say,
        arguments.disk,
        arguments.block_bytes,
    )
    if arguments.json:
        print("\n".join(json.dumps(each.as_dict()) for each in outcomes))
    else:
        print(table(outcomes, arguments.prefill_tokens_per_s))
    if arguments.plot is not None:
        plot(outcomes, arguments.plot)
    return outcome.OK


def _speed(text: str) -> float:
    if not 0 < (speed := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no speed above 0")
    return speed
