"""How much RAM there is for a pool, and the refusal of one that is too large."""

from __future__ import annotations

import re

import pytest

from kvortex.config import GIB
from kvortex.core import ConfigError
from kvortex.free_memory import free_memory_bytes, require_free_memory


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


@pytest.mark.parametrize(
    ("numbers", "cache", "free"),
    [
        ({"memory.max": 10 * GIB, "memory.current": 4 * GIB}, GIB, 7 * GIB),
        ({"memory.max": 99 * GIB, "memory.current": 4 * GIB}, GIB, 20 * GIB),
        ({"memory.max": None, "memory.current": 4 * GIB}, GIB, 20 * GIB),
        ({"memory.max": 10 * GIB, "memory.current": None}, GIB, 20 * GIB),
    ],
)
def test_free_memory_is_the_lesser_limit(
    numbers: dict[str, int | None], cache: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine has 20 GiB available; a control group's file cache can be given up."""
    monkeypatch.setattr("kvortex.free_memory._meminfo", lambda _: 20 * GIB)
    monkeypatch.setattr("kvortex.free_memory._cgroup_number", numbers.__getitem__)
    monkeypatch.setattr("kvortex.free_memory._cgroup_stat", lambda _: cache)
    assert free_memory_bytes() == free
