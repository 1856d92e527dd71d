"""Runs tasks, each in a process of its own that gives all memory back, and ends them for sure."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvortex.benchmark.measured import Measured
from kvortex.benchmark.task import BenchmarkError
from kvortex.vllm_log import VllmLog

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvortex.benchmark.task import Task

SETTINGS = {
    "OMP_NUM_THREADS": "1",  # of vLLM's on a CPU; spinning threads starve those that copy
    "PYTHONHASHSEED": "0",  # so that vLLM 0.26 finds on disk what the process before left
    "TRITON_F32_DEFAULT": "ieee",  # so that float32 models attend in float32 on a GPU too
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it would be compiled first, and nothing is sampled
}
FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Its steps are driven from the process that measures."""
TO_END_S = 60


def run_task(task: Task, say: Callable[[str], None]) -> Measured:
    """Run it, and return when its process is gone.

    Args:
        task: what to do.
        say: called with each line of progress.

    Raises:
        BenchmarkError: it failed; vLLM's log is kept, and named.
    """
    with tempfile.TemporaryDirectory(prefix="kvortex-bench-") as folder:
        log = VllmLog(Path(folder) / "vllm.log")
        command = [sys.executable, "-m", "kvortex.benchmark.process", task.to_json()]
        with log.path.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=SETTINGS | dict(os.environ) | FORCED,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
                text=True,
            )
        try:
            found = _listen(process, say)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TO_END_S)
            return found
        except BenchmarkError as error:
            raise BenchmarkError(_with_log(log.refusal() or str(error), log.path)) from None
        finally:
            _end(process)


def _listen(process: subprocess.Popen[str], say: Callable[[str], None]) -> Measured:
    """Until it told what it measured."""
    assert process.stdout is not None
    for line in process.stdout:
        message = json.loads(line)
        if "measured" in message:
            return Measured.from_dict(message["measured"])
        if "error" in message:
            raise BenchmarkError(" ".join(message["error"].split()))
        say(message["say"])
    raise BenchmarkError(f"vLLM's process ended with code {process.wait()}")


def _with_log(why: str, log: Path) -> str:
    """The error, and where the log is now that its folder goes."""
    descriptor, kept = tempfile.mkstemp(prefix="kvortex-bench-", suffix=".log")
    os.close(descriptor)
    shutil.copy(log, kept)
    return f"{why} (vLLM's log: {kept})"


def _end(process: subprocess.Popen[str]) -> None:
    """End it, if need be, and whatever it started."""
    assert process.stdout is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
