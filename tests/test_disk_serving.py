"""A real vLLM whose KV blocks overflow to disk, and find their way back, also in a second life."""

from __future__ import annotations

import errno
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from disks import Faults
from engines import (
    answers,
    connector,
    counters,
    prompts,
    running,
    whole_blocks,
    worker_of_this_process,
)

import kvortex.disk.breaker
from kvortex import KVortexConfig
from kvortex.disk import DiskStore

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

LENGTHS = [1500, 1100, 1300, 900]
TOKENS = 8
FEW_BLOCKS = 60
"""In the GPU's cache and in host RAM; the prompts have 150."""
SLOT = 128 << 10
"""Bytes of a block on disk."""


@pytest.fixture(scope="module")
def right(tiny_model: str) -> list[list[int]]:
    """The outputs of a vLLM without KVortex, one prompt at a time."""
    with running(tiny_model, None) as llm:
        return [answers(llm, [prompt], TOKENS)[0][0] for prompt in prompts(LENGTHS)]


def with_disk(folder: Path, **settings: Any) -> dict[str, Any]:
    """Settings of an engine with little memory and a disk."""
    own = {"ram_pool_gb": 0.016, "admission": "always", "load": "always", "disk_pool_gb": 0.25}
    config = KVortexConfig(**own | {"disk_path": str(folder)} | settings)
    return {
        "num_gpu_blocks_override": FEW_BLOCKS,
        "max_model_len": 1700,
        "kv_transfer_config": config.kv_transfer_config(),
    }


def settled(llm: Any) -> dict[str, float]:
    """Counters once nothing is under way any more."""
    engine = llm.llm_engine
    for _ in range(10_000):
        if not engine.engine_core.engine_core.scheduler.connector.has_pending_push_work():
            return counters(llm)
        engine.step()
    raise AssertionError("the disk does not come to rest")


def test_what_left_the_host_comes_back_from_disk_and_is_there_after_a_restart(
    tiny_model: str, right: list[list[int]], tmp_path: Path
) -> None:
    asked = prompts(LENGTHS)
    with running(tiny_model, None, **with_disk(tmp_path)) as llm:
        for _ in range(2):
            for one, expected in zip(asked, right, strict=True):
                assert answers(llm, [one], TOKENS)[0] == [expected]
                settled(llm)
        first = counters(llm)
        assert first["disk_written_blocks"] > FEW_BLOCKS
        assert first["disk_read_blocks"] > FEW_BLOCKS
        assert first["disk_failed_reads"] == first["disk_late_reads"] == 0
    with running(tiny_model, None, **with_disk(tmp_path)) as llm:
        outputs, cached = answers(llm, [asked[0]], TOKENS)
        assert outputs == [right[0]]
        assert cached == whole_blocks(LENGTHS[:1])
        second = settled(llm)
        assert second["disk_survivors"] > 2 * FEW_BLOCKS
        assert second["disk_hit_tokens"] == cached[0]


def test_a_drive_that_fails_costs_hits_only(
    tiny_model: str, right: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails, corrupts, is slow and mends, while conversations return.

    Pauses are short, or on a busy machine the last of those that grew while the drive failed might
    outlast all that follows.
    """
    monkeypatch.setattr(kvortex.disk.breaker, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(kvortex.disk.breaker, "LONGEST_PAUSE_S", 0.2)
    faults, asked = Faults(), prompts(LENGTHS)
    faulty = functools.partial(DiskStore, open_file=faults.open_file)
    monkeypatch.setattr("kvortex.connector.worker_side.DiskStore", faulty)
    settings = with_disk(tmp_path, disk_read_deadline_ms=300)
    with running(tiny_model, None, **settings) as llm:
        for way in ("works", "fails", "works", "is slow", "corrupts", "works"):
            faults.error = errno.EIO if way == "fails" else None
            faults.delay = 0.02 if way == "is slow" else 0.0
            if way == "corrupts":
                flip_bytes(tmp_path)
            assert [answers(llm, [one], TOKENS)[0][0] for one in asked] == right
        counted = counters(llm)
        assert counted["disk_failed_reads"] > 0
        assert counted["disk_times_off"] > 0
        assert counted["disk_read_blocks"] > 0
        assert counted["failed_loads"] == 0


def test_bytes_that_flip_between_two_lives_cost_hits_only_and_each_is_counted(
    tiny_model: str, right: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was corrupt is computed and written anew, and then comes back."""
    asked = prompts(LENGTHS)
    with running(tiny_model, None, **with_disk(tmp_path)) as llm:
        for one in asked:
            answers(llm, [one], TOKENS)
            settled(llm)
        on_disk = connector(llm)._scheduler.offload.overflow.disk.index
        flipped = set(sorted(block.slot for block in on_disk)[3::7])
        assert worker_of_this_process()._copy_engine.pool.slot_bytes == SLOT
    flip_bytes(tmp_path, flipped)
    tried = noted_reads(monkeypatch)
    with running(tiny_model, None, **with_disk(tmp_path)) as llm:
        for _ in range(3):
            for one, expected in zip(asked, right, strict=True):
                assert answers(llm, [one], TOKENS)[0] == [expected]
                found = settled(llm)["disk_corrupt_blocks"]
                assert found == len(flipped & tried)
        counted = counters(llm)
        assert found > len(LENGTHS)
        assert counted["disk_failed_reads"] == found
        assert counted["disk_read_blocks"] > 2 * FEW_BLOCKS
        assert counted["corrupt_blocks"] == counted["failed_loads"] == 0
        assert connector(llm)._scheduler.gauges.quarantined_slots == 0
        last = answers(llm, [asked[0]], TOKENS)
        assert last == ([right[0]], whole_blocks(LENGTHS[:1]))


def test_a_killed_server_leaves_what_the_next_one_serves(
    tiny_model: str, right: list[list[int]], tmp_path: Path
) -> None:
    asked = prompts(LENGTHS)
    killed = subprocess.run(
        [sys.executable, "-c", FIRST_LIFE, tiny_model, str(tmp_path)],
        cwd=Path(__file__).parent,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    with running(tiny_model, None, **with_disk(tmp_path)) as llm:
        outputs, cached = answers(llm, asked[:1], TOKENS)
        assert outputs == right[:1]
        assert cached == whole_blocks(LENGTHS[:1])
        assert counters(llm)["disk_hit_tokens"] == cached[0]


FIRST_LIFE = """
import os, signal, sys
from pathlib import Path
from engines import answers, prompts, running
from test_disk_serving import LENGTHS, TOKENS, settled, with_disk

with running(sys.argv[1], None, **with_disk(Path(sys.argv[2]))) as llm:
    first, second = prompts(LENGTHS)[:2]
    answers(llm, [first], TOKENS)
    settled(llm)
    answers(llm, [second], TOKENS)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def noted_reads(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The slots on disk that are read from now on."""
    read, slots = DiskStore.read, set[int]()

    def noted(store: DiskStore, move: int, keys: Any, disk_slots: Any, where: Any) -> None:
        slots.update(disk_slots)
        read(store, move, keys, disk_slots, where)

    monkeypatch.setattr(DiskStore, "read", noted)
    return slots


def flip_bytes(folder: Path, of: set[int] | None = None) -> None:
    """One of these slots on the disk; None is all."""
    (slots,) = folder.glob("*/rank-0/slots")
    with slots.open("r+b") as file:
        for slot in range(slots.stat().st_size // SLOT) if of is None else of:
            place = slot * SLOT + 100
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
