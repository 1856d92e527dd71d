"""NUMA: which node is chosen, what is refused, and memory that is where it was asked for."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvortex import numa
from kvortex.core import ConfigError
from kvortex.host_memory import HostMemory
from kvortex.numa import choose_node, node_of_gpu, nodes_of, nodes_with_memory, prefer_node

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ADDRESS = "0000:c1:00.0"
NO_NUMA = pytest.mark.skipif(
    not Path("/sys/devices/system/node/node0").exists(), reason="a kernel without NUMA"
)
IN_A_CONTAINER = """
import ctypes, logging, struct, sys
sys.path[:0] = {path!r}
from kvortex import numa
from kvortex.host_pool import HostPool
logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
libc = ctypes.CDLL(None, use_errno=True)
load, equal, give = 0x20, 0x15, 0x06
rules = [(load, 0, 0, 0), (equal, 1, 0, {mbind}), (equal, 0, 1, {move}), (give, 0, 0, 0x50001)]
rules.append((give, 0, 0, 0x7FFF0000))
text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("rules", ctypes.c_void_p))
program = Program(len(rules), ctypes.addressof(text))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(program)) == 0
with HostPool(4, 4096, pinned=False, node=0) as pool:
    pool.bytes.fill_(7)
    assert pool.bytes.eq(7).all()
    assert numa.nodes_of(pool.address, 4 * 4096) == {{}}
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sockets, with the GPU on the second."""
    (tmp_path / "devices/system/node").mkdir(parents=True)
    (tmp_path / "devices/system/node/has_memory").write_text("0-1\n")
    (tmp_path / f"bus/pci/devices/{ADDRESS}").mkdir(parents=True)
    (tmp_path / f"bus/pci/devices/{ADDRESS}/numa_node").write_text("1\n")
    monkeypatch.setattr(numa, "SYSFS", tmp_path)
    facts = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    return tmp_path


def test_the_node_next_to_the_gpu(machine: Path) -> None:
    assert node_of_gpu(GPU) == 1
    assert choose_node(None, GPU) == 1


def test_the_users_word_goes_first(machine: Path) -> None:
    assert choose_node(0, GPU) == 0
    assert choose_node(1, CPU) == 1


def test_a_pool_for_the_cpu_may_be_anywhere(machine: Path) -> None:
    assert choose_node(None, CPU) is None


def test_a_node_that_does_not_exist_is_refused_in_one_line(machine: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_node(7, GPU)
    assert str(caught.value) == "numa_node=7: this machine has memory on node 0, 1"


@pytest.mark.parametrize("text", ["-1\n", "5\n", "", None])
def test_an_unknown_node_is_one_warning(
    text: str | None, machine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Firmware often says -1."""
    told = machine / f"bus/pci/devices/{ADDRESS}/numa_node"
    told.unlink() if text is None else told.write_text(text)
    assert choose_node(None, GPU) is None
    (record,) = caplog.records
    assert "set numa_node" in record.getMessage()


@pytest.mark.parametrize("nodes", ["0\n", None])
@pytest.mark.parametrize("wanted", [None, 0])
def test_machines_with_one_node_stay_silent(
    nodes: str | None, wanted: int | None, machine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = machine / "devices/system/node/has_memory"
    told.unlink() if nodes is None else told.write_text(nodes)
    with caplog.at_level(logging.DEBUG):
        assert choose_node(wanted, GPU) is None
    assert caplog.records == []


@pytest.mark.parametrize(
    ("text", "nodes"), [("0-3\n", [0, 1, 2, 3]), ("0,2-3\n", [0, 2, 3]), ("8\n", [8]), ("", [0])]
)
def test_lists_of_nodes(text: str, nodes: list[int], machine: Path) -> None:
    (machine / "devices/system/node/has_memory").write_text(text)
    assert nodes_with_memory() == nodes


@NO_NUMA
def test_memory_is_on_the_node_that_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    memory, node = HostMemory(64 << 20), nodes_with_memory()[-1]
    assert prefer_node(memory.address, memory.size, node)
    assert nodes_of(memory.address, memory.size) == {}
    memory.populate(0, memory.size)
    assert nodes_of(memory.address, memory.size)[node] > 0.9
    assert sum(nodes_of(memory.address, memory.size).values()) == pytest.approx(1)
    assert caplog.records == []
    memory.close()


@NO_NUMA
def test_memory_stays_usable_where_the_kernel_refuses(caplog: pytest.LogCaptureFixture) -> None:
    memory = HostMemory(1 << 20)
    assert not prefer_node(memory.address, memory.size, 1000)
    (record,) = caplog.records
    assert record.getMessage().startswith("Host memory cannot be put on NUMA node 1000 (Invalid")
    assert memory.bytes.fill_(3).eq(3).all()
    memory.close()


@pytest.mark.skipif(platform.machine() not in numa.CALLS, reason="an unknown machine")
def test_a_container_without_the_privilege_is_one_warning() -> None:
    """Docker's own rules refuse these calls, as a filter of the kernel's does here."""
    mbind, move = numa.CALLS[platform.machine()]
    code = IN_A_CONTAINER.format(path=sys.path, mbind=mbind, move=move)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "WARNING Host memory cannot be put on NUMA node 0 (Operation not permitted); "
        "it is where the kernel puts it."
    ]


def test_an_unknown_machine_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not prefer_node(0, 4096, 0)
    assert "Function not implemented" in caplog.text
    assert nodes_of(0, 4096) == {}
