"""NUMA: which node is near a GPU, having memory there, and seeing whether it is. Linux's own calls.

They are made without libnuma, which few machines have.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import platform
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvortex.core import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

logger = logging.getLogger(__name__)

SYSFS = Path("/sys")
CALLS = {"x86_64": (237, 279), "aarch64": (235, 239)}
"""Numbers of mbind and move_pages."""
MPOL_PREFERRED = 1
"""Not MPOL_BIND: where a node is full, that has the kernel kill a process to make room on it."""
MASK_BITS = 1024
SAMPLES = 1024

_libc = ctypes.CDLL(None, use_errno=True)


def choose_node(wanted: int | None, device: torch.device) -> int | None:
    """The node for host memory that a device uses; None where there is nothing to choose.

    Args:
        wanted: the user's word, which goes before the machine's.
        device: a GPU, or the CPU.

    Raises:
        ConfigError: this machine has no such node.
    """
    nodes = require_node(wanted)
    if len(nodes) == 1 or (wanted is None and device.type != "cuda"):
        return None
    node = wanted if wanted is not None else node_of_gpu(device)
    if node is None:
        logger.warning("The NUMA node of %s is unknown; set numa_node to choose one.", device)
    return node


def require_node(wanted: int | None) -> list[int]:
    """The nodes that there are.

    Raises:
        ConfigError: the wanted one is none of them.
    """
    nodes = nodes_with_memory()
    if wanted is not None and wanted not in nodes:
        shown = ", ".join(map(str, nodes))
        raise ConfigError(f"numa_node={wanted}: this machine has memory on node {shown}")
    return nodes


def nodes_with_memory() -> list[int]:
    """Numbers of the nodes; of a machine that does not tell, 0."""
    try:
        text = (SYSFS / "devices/system/node/has_memory").read_text()
        return [number for part in text.strip().split(",") for number in _range(part)]
    except (OSError, ValueError):
        return [0]


def node_of_gpu(device: torch.device) -> int | None:
    """The node next to a GPU, if the machine tells."""
    import torch

    try:
        facts: Any = torch.cuda.get_device_properties(device)
        address = f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"
        node = int((SYSFS / "bus/pci/devices" / address / "numa_node").read_text())
    except (
        OSError,
        ValueError,
        AttributeError,
    ):  # the last: a torch that does not tell the address
        return None
    return node if node in nodes_with_memory() else None


def prefer_node(address: int, nbytes: int, node: int) -> bool:
    """Have pages that are not populated yet come from a node while it has any; False if refused.

    Containers often may not ask for it; one warning says so.
    """
    mask = (ctypes.c_ubyte * (MASK_BITS // 8))()
    mask[node // 8] = 1 << node % 8
    if _call(0, address, nbytes, MPOL_PREFERRED, mask, MASK_BITS, 0) == 0:
        return True
    logger.warning(
        "Host memory cannot be put on NUMA node %d (%s); it is where the kernel puts it.",
        node,
        os.strerror(ctypes.get_errno()),
    )
    return False


def nodes_of(address: int, nbytes: int) -> dict[int, float]:
    """On which nodes populated memory is: node to share of evenly sampled pages.

    Empty where the kernel does not tell.
    """
    count = min(SAMPLES, -(-nbytes // mmap.PAGESIZE))
    pages = (ctypes.c_void_p * count)(*(address + nbytes * i // count for i in range(count)))
    found = (ctypes.c_int * count)()
    if _call(1, 0, count, pages, None, found, 0) != 0:
        return {}
    counted = Counter(node for node in found if node >= 0)
    return {node: n / counted.total() for node, n in sorted(counted.items())}


def _call(which: int, *arguments: int | ctypes.Array[Any] | None) -> int:
    """Make one of CALLS; -1 if it failed."""
    numbers = CALLS.get(platform.machine())
    if numbers is None:
        ctypes.set_errno(errno.ENOSYS)
        return -1
    words = (ctypes.c_long(each) if isinstance(each, int) else each for each in arguments)
    status: int = _libc.syscall(ctypes.c_long(numbers[which]), *words)
    return status


def _range(part: str) -> Sequence[int]:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)
