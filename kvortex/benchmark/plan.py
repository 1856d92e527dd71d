"""Plan: what is compared in one benchmark, and the tasks that this takes."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvortex.benchmark.run import run_task
from kvortex.benchmark.task import ANSWER_TOKENS, BenchmarkError, Task
from kvortex.benchmark.ways import KVORTEX, WAYS, kv_transfer_config
from kvortex.core import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvortex.benchmark.measured import Measured
    from kvortex.benchmark.task import Conversations
    from kvortex.config import KVortexConfig

SPARE_TOKENS = 128
"""For the few tokens that are asked in between."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Of a model, ways of offloading and what each is asked."""

    name: str
    """Of the model, for people."""
    model: str
    config: KVortexConfig
    ways: tuple[str, ...]
    lengths: tuple[int, ...]
    repeats: int
    conversations: Conversations | None
    users_on_gpu: int
    """How many conversations the GPU's KV cache shall hold; 0 leaves its size to vLLM."""
    vllm_arguments: tuple[str, ...]

    def carry_out(self, say: Callable[[str], None]) -> tuple[dict[str, Measured], dict[str, str]]:
        """Run way after way; returns what was measured, and why the others failed.

        Interrupted, it returns what it has.

        Raises:
            BenchmarkError: the first failed, on a model or an argument that the others have too.
            ConfigError: the disk_path cannot be used.
        """
        measured: dict[str, Measured] = {}
        failed: dict[str, str] = {}
        for way in self.ways:
            try:
                measured[way] = self._measure(way, say)
            except BenchmarkError as error:
                if not measured and not failed:
                    raise BenchmarkError(f"{WAYS[way]} failed: {error}") from None
                failed[way] = str(error)
                say(f"{WAYS[way]} failed: {error}")
            except KeyboardInterrupt:
                if not measured:
                    raise
                failed |= dict.fromkeys(self.ways[self.ways.index(way) :], "interrupted")
                break
        return measured, failed

    def _measure(self, way: str, say: Callable[[str], None]) -> Measured:
        with ExitStack() as stack:
            config = self.config
            if config.disk_path is not None:
                folder = stack.enter_context(_folder_in(config.disk_path))
                config = config.model_copy(update={"disk_path": folder})
            first, *others = self._tasks(way, config)
            found = run_task(first, lambda line: say(f"{WAYS[way]}: {line}"))
            for task in others:
                found = found.then(run_task(task, lambda line: say(f"{WAYS[way]}, again: {line}")))
        return found

    def _tasks(self, way: str, config: KVortexConfig) -> list[Task]:
        """One; with a disk another that finds there what the first left when it ended."""
        whole = Task(
            model=self.model,
            kv_transfer_config=kv_transfer_config(way, config),
            vllm_arguments=self.vllm_arguments,
            lengths=self.lengths,
            repeats=self.repeats,
            gpu_tokens=self._gpu_tokens(),
            conversations=self.conversations,
        )
        if way != KVORTEX or config.disk_path is None:
            return [whole]
        return [
            replace(whole, leave_on_disk=True),
            replace(whole, disk=True),
        ]

    def _gpu_tokens(self) -> int | None:
        if self.conversations is None or self.users_on_gpu == 0:
            return None
        held = self.users_on_gpu * self.conversations.longest
        return max(held, *(length + ANSWER_TOKENS for length in self.lengths)) + SPARE_TOKENS


def _folder_in(disk_path: str) -> tempfile.TemporaryDirectory[str]:
    """A folder of our own, so that nothing of an earlier run is a hit; gone afterwards.

    Raises:
        ConfigError: there can be none.
    """
    try:
        folder = Path(disk_path).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="kvortex-bench-", dir=folder)
    except OSError as error:
        raise ConfigError(f"disk_path={disk_path!r}: {error.strerror}") from None
