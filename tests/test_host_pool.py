"""HostPool: slots in one piece of memory, and refusals that say how much there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from kvortex.config import GIB
from kvortex.core import ConfigError, PoolAllocationError
from kvortex.host_pool import HostPool, free_memory_bytes, require_free_memory


@pytest.fixture
def pinned(device: torch.device) -> bool:
    return device.type == "cuda"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_slots_are_one_piece_of_memory(pinned: bool) -> None:
    with HostPool(5, 48, pinned) as pool:
        assert pool.bytes.shape == (5, 48)
        assert pool.bytes.stride() == (48, 1)
        assert pool.bytes.dtype is torch.uint8
        assert pool.bytes.data_ptr() == pool.address
        assert pool.address % 4096 == 0
        assert (pool.num_slots, pool.slot_bytes) == (5, 48)
        pool.bytes.copy_(torch.arange(240, dtype=torch.uint8).view(5, 48))
        assert pool.bytes[4, 47] == 239


def test_pinned_exactly_if_asked(pinned: bool) -> None:
    with HostPool(5, 1 << 20, pinned) as pool:
        assert pool.bytes.is_pinned() is pinned
        address = pool.address
    assert pool.address == address


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_reads_and_writes_the_whole_pool() -> None:
    with HostPool(3, (300 << 20) + 16, pinned=True) as pool:
        pool.bytes[:, -1] = torch.tensor([1, 2, 3], dtype=torch.uint8)
        assert pool.bytes.to("cuda")[:, -1].tolist() == [1, 2, 3]
        pool.bytes.copy_(torch.full(pool.bytes.shape, 7, dtype=torch.uint8, device="cuda"))
        assert pool.bytes.eq(7).all()


def test_closed_twice(pinned: bool) -> None:
    pool = HostPool(5, 48, pinned)
    pool.close()
    pool.close()
    assert pool.bytes.shape == (0, 48)


def test_close_gives_memory_back(pinned: bool) -> None:
    before = resident_bytes()
    with HostPool(64, 1 << 20, pinned) as pool:
        pool.bytes.fill_(1)
        assert resident_bytes() - before > 60 << 20
    assert resident_bytes() - before < 30 << 20


def test_a_view_outlives_close(pinned: bool) -> None:
    with HostPool(5, 48, pinned) as pool:
        view = pool.bytes[2].fill_(9)
    assert view.eq(9).all()


def test_context_manager_closes_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), HostPool(5, 48, pinned=False) as pool:
        assert pool.bytes[1 // 0] is None
    assert pool.bytes.shape == (0, 48)


@pytest.mark.parametrize("num_slots", [1 << 40, 1 << 62])
def test_more_than_can_be_allocated(num_slots: int) -> None:
    with pytest.raises(PoolAllocationError) as caught:
        HostPool(num_slots, 1 << 20, pinned=False)
    message = str(caught.value)
    assert message.startswith(
        f"cannot allocate {num_slots * (1 << 20) / GIB:.1f} GiB of host memory"
    )
    assert re.search(r": [\d.]+ GiB are free, ulimit -l is (unlimited|[\d.]+ GiB); ", message)
    assert message.endswith("lower ram_pool_gb")
    assert isinstance(caught.value, MemoryError)


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
    monkeypatch.setattr("kvortex.host_pool.free_memory_bytes", lambda: 4 * GIB)
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
    monkeypatch.setattr("kvortex.host_pool._meminfo", lambda _: 20 * GIB)
    monkeypatch.setattr("kvortex.host_pool._cgroup_number", numbers.__getitem__)
    monkeypatch.setattr("kvortex.host_pool._cgroup_stat", lambda _: cache)
    assert free_memory_bytes() == free
