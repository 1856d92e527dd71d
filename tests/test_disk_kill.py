"""A server killed at any moment: the next one serves what was completely written, nothing else."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disks import block_bytes, opened, read, seal, verified_by

KILLS = int(os.environ.get("KVORTEX_KILLS", "25"))
NUM_SLOTS = 16
SLOT_BYTES = 64 << 10
NURSERY = """
import os, sys
import torch, disks, test_disk_kill
for line in sys.stdin:
    path, kind = line.strip().split("|")
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        test_disk_kill.write_forever(path, kind, writer)
    os.close(writer)
    os.read(reader, 1)  # it writes
    os.close(reader)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


def write_forever(path: str, kind: str, started: int) -> None:
    """In a process of its own, until it is killed."""
    draw, job = random.Random(), 0
    how = verified_by(kind, SLOT_BYTES)
    with opened(Path(path), NUM_SLOTS, slot_bytes=SLOT_BYTES, verification=how, readers=1) as (
        store,
        pool,
    ):
        data = {key: block_bytes(key, slot_bytes=SLOT_BYTES) for key in keys()}
        os.write(started, b".")
        while True:
            job += 1
            slots = draw.sample(range(NUM_SLOTS), 8)
            chosen = draw.sample(keys(), 8)
            for slot, key in zip(slots, chosen, strict=True):
                pool.bytes[slot].numpy()[:] = bytearray(data[key])
                seal(pool, slot, key, how)
            store.write(job, chosen, slots, slots)
            while job not in store.poll().ended:
                store.wait(1)


def keys() -> list[bytes]:
    return [b"key-%d" % number for number in range(24)]


@pytest.mark.parametrize("kind", ["the CPU", "the GPU"])
def test_killed_at_any_moment_it_serves_no_wrong_byte(kind: str, tmp_path: Path) -> None:
    how = verified_by(kind, SLOT_BYTES)
    draw, served, missed = random.Random(0), 0, 0
    expected = {key: block_bytes(key, slot_bytes=SLOT_BYTES) for key in keys()}
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    ) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for _ in range(KILLS):
            nursery.stdin.write(f"{tmp_path}|{kind}\n")
            nursery.stdin.flush()
            child = int(nursery.stdout.readline())
            time.sleep(draw.random() * 0.05)
            os.kill(child, signal.SIGKILL)
            assert nursery.stdout.readline() == "gone\n"
            with opened(tmp_path, NUM_SLOTS, slot_bytes=SLOT_BYTES, verification=how) as (
                store,
                pool,
            ):
                found = store.survivors
                assert len(found.keys) == len(set(found.keys))
                blocks = read(store, pool, found.keys, found.slots.tolist(), how)
                for key, block in zip(found.keys, blocks, strict=True):
                    assert block in {None, expected[key]}
                served += len(blocks) - blocks.count(None)
                missed += blocks.count(None)
        nursery.stdin.close()
    assert served > KILLS  # the cache survives, not only the rule
    assert missed == 0  # a record is only there once its bytes are
