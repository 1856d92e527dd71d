"""How much RAM there is for a pool, and the refusal of one that is too large."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from kvortex.config import GIB
from kvortex.core import ConfigError
from kvortex.free_memory import cgroup_limit_bytes, free_memory_bytes, require_free_memory

if TYPE_CHECKING:
    from pathlib import Path


def test_more_than_is_free_is_refused() -> None:
    free = free_memory_bytes()
    with pytest.raises(ConfigError) as caught:
        require_free_memory(50000, 2 * free + (1 << 40))
    found = re.fullmatch(
        r"ram_pool_gb=50000: this machine has ([\d.]+) GiB of free RAM; "
        r"use at most ram_pool_gb=([\d.]+)",
        str(caught.value),
    )
    assert found is not None
    assert float(found[1]) == pytest.approx(free / GIB, rel=0.2)
    assert float(found[2]) == pytest.approx(float(found[1]) * 0.9, abs=0.2)
    require_free_memory(float(found[2]), int(float(found[2]) * GIB * 0.9))


def test_limit_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.free_memory.free_memory_bytes", lambda: 4 * GIB)
    require_free_memory(4, 4 * GIB)
    with pytest.raises(
        ConfigError, match=r"has 4\.0 GiB of free RAM; use at most ram_pool_gb=3\.6"
    ):
        require_free_memory(4, 4 * GIB + 1)


OWN = "kube/pod/box"


def group(folder: Path, version: int, limit: str, used: int, reclaimable: int = 0) -> None:
    """As the kernel shows it."""
    names = {1: ("limit_in_bytes", "usage_in_bytes", "total_"), 2: ("max", "current", "")}
    limit_name, used_name, prefix = names[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"memory.{limit_name}").write_text(f"{limit}\n")
    (folder / f"memory.{used_name}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 7\n{prefix}inactive_file {reclaimable}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where groups are mounted, on a machine that has 20 GiB available."""
    monkeypatch.setattr("kvortex.free_memory._meminfo", lambda _: 20 * GIB)
    monkeypatch.setattr("kvortex.control_group.MOUNT", tmp_path / "groups")
    monkeypatch.setattr("kvortex.control_group.MEMBERSHIP", tmp_path / "membership")
    return tmp_path / "groups"


def is_in(groups: Path, *lines: str) -> None:
    (groups.parent / "membership").write_text("".join(f"{line}\n" for line in lines))


def told() -> tuple[int, int | None]:
    """GiB that are free, and that control groups allow."""
    limit = cgroup_limit_bytes()
    return free_memory_bytes() // GIB, None if limit is None else limit // GIB


def test_without_groups_the_machine_is_the_limit(groups: Path) -> None:
    assert told() == (20, None)
    is_in(groups, f"0::/{OWN}")
    assert told() == (20, None)
    group(groups / OWN, 2, "max", 4 * GIB)
    assert told() == (20, None)
    group(groups / OWN, 2, str(99 * GIB), 4 * GIB)
    assert told() == (20, 99)


def test_a_limit_counts_without_the_file_cache_that_can_be_given_up(groups: Path) -> None:
    is_in(groups, f"0::/{OWN}")
    group(groups / OWN, 2, str(10 * GIB), 4 * GIB, GIB)
    assert told() == (7, 10)


def test_a_group_around_it_limits_it_too(groups: Path) -> None:
    is_in(groups, f"0::/{OWN}")
    group(groups / OWN, 2, "max", GIB)
    group(groups / OWN / "..", 2, str(8 * GIB), 3 * GIB)
    assert told() == (5, 8)


def test_version_one_is_looked_at_also_where_version_two_is_mounted(groups: Path) -> None:
    is_in(groups, "5:cpu,cpuacct:/", f"4:memory:/{OWN}", "0::/init.scope")
    group(groups / "memory", 1, str((1 << 63) - 4096), 9 * GIB)
    assert told() == (20, None)
    group(groups / "memory" / OWN, 1, str(6 * GIB), 2 * GIB, GIB)
    assert told() == (5, 6)


def test_in_a_container_the_mount_is_the_group(groups: Path) -> None:
    """Its path is one of the host, which is not to be seen."""
    is_in(groups, "4:memory:/docker/0123")
    group(groups / "memory", 1, str(6 * GIB), 2 * GIB)
    assert told() == (4, 6)
