"""The process of one task: starts a vLLM, measures, tells on standard output, and ends with it.

    python -m kvortex.benchmark.process TASK

Each line of its output is a JSON object: {"say": ...}, {"error": ...} or {"measured": ...}. What
vLLM and its own processes print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvortex.benchmark.conversations import converse
from kvortex.benchmark.engine import open_engine
from kvortex.benchmark.first_token import measure
from kvortex.benchmark.measured import Measured
from kvortex.benchmark.serving import Serving
from kvortex.benchmark.task import Task
from kvortex.core import KVortexError

if TYPE_CHECKING:
    from collections.abc import Callable

WARM_UP_TOKENS = 64


def work(task: Task, say: Callable[[str], None]) -> Measured:
    """Do what the task says, in this process.

    Raises:
        KVortexError: it cannot be done.
    """
    say("vLLM starts")
    began = time.perf_counter()
    serving = Serving(open_engine(task))
    start_up = time.perf_counter() - began
    say(f"vLLM is up after {start_up:.0f} s")
    serving.ask(serving.prompt(WARM_UP_TOKENS))
    serving.wait_for_memory()
    samples = tuple(measure(serving, task, say))
    conversed = None
    if task.leave_on_disk:
        say("the disk is being written")
        serving.wait_until_on_disk()
    elif task.conversations is not None:
        shape = task.conversations
        say(f"{shape.users} users with contexts of {shape.context} tokens return")
        serving.clear()
        conversed = converse(serving, shape)
    measured = Measured(start_up, serving.block_tokens, serving.gpu_tokens, samples, conversed)
    serving.close()
    return measured


def main() -> int:
    """Run the task in the first argument; 0, or 1 with an error told."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(**message: object) -> None:
        print(json.dumps(message), file=channel, flush=True)

    try:
        measured = work(Task.from_json(sys.argv[1]), lambda line: tell(say=line))
    except KVortexError as error:
        tell(error=str(error))
        return 1
    except Exception as error:
        tell(error=f"{type(error).__name__}: {error}")
        raise
    tell(measured=asdict(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
