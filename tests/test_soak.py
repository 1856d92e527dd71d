"""A real vLLM under returning conversations, aborts, resets and faults, for as long as asked.

`make soak` runs it for ten minutes, or SECONDS_TO_RUN; in the test suite it takes half a minute.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import gc
import itertools
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from disks import Faults
from engines import answers, connector, counters, prompts, running, worker_of_this_process

from kvortex import KVortexConfig, TransferError
from kvortex.core import Direction
from kvortex.disk import DiskStore

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

PATIENCE_S = 300
"""A slow machine may need that much longer for everything to happen once."""
SECONDS = float(os.environ.get("SOAK_SECONDS", "30"))
CONVERSATIONS, TURNS = 8, 3
OUTPUT_TOKENS = 8
MOST_AT_ONCE = 4
GROWTH_BYTES = 160 << 20
"""Of resident memory that the second half may add. oneDNN keeps a primitive for each of its last
1024 shapes: of 80 MB that come in the second half minute, 20 come in the second minute."""


class Soak:
    """Asks, aborts, resets and breaks things at random; every answer must be the right one."""

    def __init__(self, llm: Any, right: dict[tuple[int, ...], list[int]], faults: Faults) -> None:
        self.llm, self.engine = llm, llm.llm_engine
        self.right, self.faults = right, faults
        self.draw = random.Random(0)
        self.numbers = itertools.count()
        self.asked: dict[str, tuple[int, ...]] = {}
        self.seen = Counter[str]()
        self.copies_fail: set[Direction] = set()
        copy_engine = worker_of_this_process()._copy_engine
        self.whole_copy = copy_engine._copy  # by which it also loads layer by layer
        copy_engine._copy = self.copy

    def copy(self, direction: Direction, *where: Any) -> Any:
        if direction in self.copies_fail and self.draw.random() < 0.3:
            self.seen[f"failed {direction.value}"] += 1
            raise TransferError("made to fail")
        return self.whole_copy(direction, *where)

    @property
    def unseen(self) -> list[str]:
        """What has not happened yet and should."""
        wanted = ("answered", "aborted", "reset", "failed load", "failed store")
        return [what for what in wanted if not self.seen[what]]

    def ask(self) -> None:
        from vllm import SamplingParams

        tokens = self.draw.choice(list(self.right))
        greedy = SamplingParams(
            max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True, detokenize=False
        )
        name = f"soak-{next(self.numbers)}"
        self.engine.add_request(name, {"prompt_token_ids": list(tokens)}, greedy)
        self.asked[name] = tokens

    def abort(self) -> None:
        name = self.draw.choice(list(self.asked))
        self.engine.abort_request([name])
        del self.asked[name]
        self.seen["aborted"] += 1

    def step(self) -> None:
        self.faults.unsynced.clear()
        for output in self.engine.step():
            tokens = self.asked.pop(output.request_id, None)
            if output.finished and tokens is not None:
                assert list(output.outputs[0].token_ids) == self.right[tokens]
                self.seen["answered"] += 1
            elif tokens is not None:
                self.asked[output.request_id] = tokens

    def rest(self) -> None:
        """Let everything end."""
        for _ in range(100_000):
            if not self.asked and not connector(self.llm).has_pending_push_work():
                return
            self.step()
        raise AssertionError(f"never at rest: {self.asked}")

    def reset(self) -> None:
        self.rest()
        assert self.llm.reset_prefix_cache(reset_connector=self.draw.random() < 0.3)
        self.seen["reset"] += 1

    def change_the_weather(self) -> None:
        self.copies_fail = {way for way in Direction if self.draw.random() < 0.3}
        self.faults.error = self.draw.choice([None, None, errno.EIO, errno.ENOSPC])
        self.faults.delay = self.draw.choice([0.0, 0.0, 0.01])

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            what = self.draw.random()
            if what < 0.02:
                self.change_the_weather()
            elif what < 0.03:
                self.reset()
            elif what < 0.05 and self.asked:
                self.abort()
            elif len(self.asked) < MOST_AT_ONCE and what < 0.3:
                self.ask()
            else:
                self.step()


def conversations() -> list[dict[str, list[int]]]:
    """Every turn of every conversation, each beginning with the turns before it."""
    asked = []
    for number in range(CONVERSATIONS):
        draw = random.Random(number)
        tokens: list[int] = prompts([64])[0]["prompt_token_ids"]  # what all begin with
        for _ in range(TURNS):
            tokens = tokens + [draw.randrange(4, 260) for _ in range(draw.randrange(100, 400))]
            asked.append({"prompt_token_ids": tokens})
    return asked


def resident_bytes() -> int:
    """Without what is free, and kept by malloc for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def held() -> tuple[int, int]:
    """Threads and open files."""
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))


def test_soak(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")  # see test_a_failing_copy_costs_time_only
    faults, asked = Faults(), conversations()
    faulty = functools.partial(DiskStore, open_file=faults.open_file)
    monkeypatch.setattr("kvortex.connector.worker_side.DiskStore", faulty)
    with running(tiny_model, None) as llm:
        right = {
            tuple(one["prompt_token_ids"]): answers(llm, [one], OUTPUT_TOKENS)[0][0]
            for one in asked
        }
    config = KVortexConfig(
        ram_pool_gb=0.012,
        load="always",
        disk_path=str(tmp_path),
        disk_pool_gb=0.05,
        disk_read_deadline_ms=200,
    )
    settings = {
        "async_scheduling": False,
        "num_gpu_blocks_override": 80,
        "max_model_len": 1536,
        "max_num_batched_tokens": 256,
        "kv_transfer_config": config.kv_transfer_config(),
    }
    with running(tiny_model, None, **settings) as llm:
        soak = Soak(llm, right, faults)
        soak.run(SECONDS / 2)
        before, held_before = resident_bytes(), held()
        soak.run(SECONDS / 2)
        slow = time.monotonic() + PATIENCE_S
        while soak.unseen and time.monotonic() < slow:
            soak.run(1)
        soak.copies_fail, faults.error = set(), None
        soak.rest()
        assert resident_bytes() - before < GROWTH_BYTES
        assert held() == held_before
        side, counted = connector(llm)._scheduler, counters(llm)
        assert not side._tracked
        assert not side._gpu._held
        assert side.offload.tier.index.reserved == side.offload.overflow.disk.index.reserved == 0
        side.offload.tier.index.check()
        side.offload.overflow.disk.index.check()
        assert soak.unseen == []
        for what in ("loaded_blocks", "disk_read_blocks", "disk_written_blocks", "evicted_blocks"):
            assert counted[what] > 0
