"""HostMemory: pages when they are asked for, and nothing left of them afterwards."""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from registrations import Registrations

from kvortex import host_memory
from kvortex.host_memory import HostMemory, huge_pages_allowed

MIB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def is_mapped(address: int) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = (line.split()[0].split("-") for line in lines)
    return any(int(first, 16) <= address < int(last, 16) for first, last in spans)


@pytest.mark.parametrize("advice", [host_memory.MADV_POPULATE_WRITE, 12345])
def test_pages_are_there_once_populated(advice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a kernel that does not know the advice."""
    monkeypatch.setattr(host_memory, "MADV_POPULATE_WRITE", advice)
    memory = HostMemory(64 * MIB)
    before = resident_bytes()
    memory.populate(16 * MIB, 32 * MIB)
    assert resident_bytes() - before == pytest.approx(32 * MIB, abs=4 * MIB)
    memory.bytes[16 * MIB] = 5
    memory.populate(16 * MIB, MIB) if advice != 12345 else None
    assert memory.bytes[16 * MIB] == 5
    memory.close()


def test_pages_that_cannot_be_had() -> None:
    memory = HostMemory(4 * MIB)
    nobodys = mmap.PAGESIZE - memory.address
    with pytest.raises(OSError, match="Cannot allocate memory"):
        memory.populate(nobodys, mmap.PAGESIZE)
    memory.close()


def test_huge_pages_where_the_machine_allows_them() -> None:
    if not huge_pages_allowed():
        pytest.skip("this machine has none")
    memory = HostMemory(64 * MIB)
    memory.populate(0, memory.size)
    rollup = Path("/proc/self/smaps_rollup").read_text()
    (line,) = (line for line in rollup.splitlines() if line.startswith("AnonHugePages:"))
    assert int(line.split()[1]) >= 32 * 1024
    memory.close()


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("always [madvise] never", True), ("[always] madvise never", True), ("[never]", False)],
)
def test_whether_huge_pages_are_allowed(
    text: str, allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "HUGE_PAGES", tmp_path / "enabled")
    assert not huge_pages_allowed()
    (tmp_path / "enabled").write_text(text)
    assert huge_pages_allowed() is allowed


def test_released_pages_are_the_kernels_again() -> None:
    memory = HostMemory(64 * MIB)
    memory.populate(0, memory.size)
    before = resident_bytes()
    memory.release(16 * MIB)
    assert before - resident_bytes() == pytest.approx(48 * MIB, abs=4 * MIB)
    memory.release(memory.size)
    memory.close()


def test_closed_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = Registrations(monkeypatch)
    memory = HostMemory(64 * MIB)
    address = memory.address
    memory.pin(0, 16 * MIB)
    memory.pin(16 * MIB, MIB)
    assert pins.now == {address: 16 * MIB, address + 16 * MIB: MIB}
    assert memory.pinned_bytes == 17 * MIB
    assert is_mapped(address)
    memory.close()
    memory.close()
    assert pins.now == {}
    assert memory.pinned_bytes == 0
    assert not is_mapped(address)


def test_a_view_keeps_the_mapping() -> None:
    memory = HostMemory(MIB)
    view = memory.bytes[7:9].fill_(9)
    memory.close()
    assert view.eq(9).all()
    address = view.data_ptr()
    del view
    assert not is_mapped(address)


def test_a_child_does_not_see_it() -> None:
    """The kernel would copy pinned pages for it, all of them."""
    memory = HostMemory(MIB)
    _, _, ours = Path("/proc/self/smaps").read_text().partition(f"\n{memory.address:x}-")
    _, _, flags = ours.partition("VmFlags:")
    assert "dc" in flags.splitlines()[0].split()  # do not copy
    memory.close()


def test_more_than_the_address_space() -> None:
    with pytest.raises((OSError, OverflowError)):
        HostMemory(1 << 60)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_refuses_what_is_pinned_already() -> None:
    torch.zeros(1, device="cuda")
    memory = HostMemory(4 * MIB)
    memory.pin(0, 2 * MIB)
    with (  # a thread of its own, or this one's next use of CUDA would report the error
        ThreadPoolExecutor(1) as thread,
        pytest.raises(MemoryError, match="already mapped"),
    ):
        thread.submit(memory.pin, 0, 2 * MIB).result()
    assert memory.pinned_bytes == 2 * MIB
    assert memory.bytes.is_pinned()
    memory.close()
