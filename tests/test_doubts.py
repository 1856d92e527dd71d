"""What `kvortex config` says of this machine before there is a server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from kvortex import KVortexConfig
from kvortex.cli import main
from kvortex.config import GIB
from kvortex.doubts import doubts
from kvortex.free_memory import free_memory_bytes

if TYPE_CHECKING:
    from pathlib import Path


def config(**settings: Any) -> KVortexConfig:
    return KVortexConfig(**{"ram_pool_gb": 0.1} | settings)


def test_what_will_do_is_not_doubted(tmp_path: Path) -> None:
    disk = {"disk_path": str(tmp_path / "new" / "kv"), "disk_pool_gb": 0.2}
    assert doubts(config(**disk, trace_path=str(tmp_path / "trace.gz"))) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ram_pool_gb": 60000}, "ram_pool_gb=60000: this machine has .* use at most ram_pool_gb="),
        ({"numa_node": 77}, "numa_node=77: this machine has memory on node"),
        ({"trace_path": "/no/folder/trace"}, "there is no folder /no/folder; name a file in one"),
        ({"trace_path": "/tmp"}, "trace_path='/tmp': it is a folder"),
        ({"disk_path": "/dev/null/kv", "disk_pool_gb": 1}, "/dev/null is no folder"),
        ({"disk_path": "/var/tmp/kv", "disk_pool_gb": 1e6}, "lower disk_pool_gb"),
        ({"disk_path": "/var/tmp/kv", "disk_pool_gb": 0.05}, "serves after a restart only"),
    ],
)
def test_each_doubt_is_a_line(settings: dict[str, Any], words: str) -> None:
    (line,) = doubts(config(**settings))
    assert re.search(words, line), line
    assert "\n" not in line


def test_what_a_cache_holds_already_is_room(tmp_path: Path) -> None:
    slots = tmp_path / ("0" * 32) / "rank-0" / "slots"
    slots.parent.mkdir(parents=True)
    with slots.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 30)
    room = os.statvfs(tmp_path)
    wanted = room.f_bavail * room.f_frsize / GIB + 0.5  # others write and remove meanwhile
    assert doubts(config(disk_path=str(tmp_path), disk_pool_gb=wanted)) == []
    slots.unlink()
    (line,) = doubts(config(disk_path=str(tmp_path), disk_pool_gb=wanted + 1))
    assert "lower disk_pool_gb" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    """By a user who may not write there: root may everywhere."""
    code = (
        "import os, sys; from kvortex import KVortexConfig; from kvortex.doubts import doubts; "
        "os.setuid(65534); print(*doubts(KVortexConfig(ram_pool_gb=0.1, disk_path='/usr/kv', "
        "disk_pool_gb=0.2, trace_path='/usr/trace')), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "trace_path='/usr/trace': /usr may not be written",
        "disk_path='/usr/kv': /usr may not be written; name a folder of your own",
    ]


def test_config_prints_in_spite_of_doubts(capsys: pytest.CaptureFixture[str]) -> None:
    """The server may be for another machine."""
    size = free_memory_bytes() // GIB + 10
    assert main(["config", "--ram-pool-gb", str(size)]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["kv_connector_extra_config"]["ram_pool_gb"] == size
    (line,) = shown.err.splitlines()
    assert line.startswith(f"kvortex: on this machine: ram_pool_gb={size}: this machine has")
