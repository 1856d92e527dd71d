"""Calibration: which mover serves a copy on this machine, as measured by `kvortex tune`."""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvortex.core import Direction

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

logger = logging.getLogger(__name__)

FORMAT = 1
SPEEDS = "GB/s"
"""Under this name, among those of machines, the file has what they reached."""
ZERO_COPY, STAGED, DMA = "zero-copy", "staged", "dma"
LARGEST_PAGE_BYTES = 1 << 40
MOST_PROGRAMS = 1024


@dataclass(frozen=True, slots=True)
class Choice:
    """For one direction and page size: the mover of small copies, of large ones, and from where.

    `busy_from_bytes` is the border while the other direction moves, too.
    """

    small: str
    large: str
    from_bytes: int
    busy_from_bytes: int
    programs: int
    """Grid of the zero-copy kernel."""

    def mover(self, nbytes: int, busy: bool) -> str:
        """Name of the mover for a copy of so many bytes."""
        border = self.busy_from_bytes if busy else self.from_bytes
        return self.large if nbytes >= border else self.small


@dataclass(frozen=True, slots=True)
class Calibration:
    """Choices by page size in bytes, and where they come from."""

    choices: dict[int, dict[Direction, Choice]]
    origin: str

    def for_page(self, page_bytes: int) -> dict[Direction, Choice]:
        """The choices measured for the page size that is nearest, by ratio."""
        nearest = min(self.choices, key=lambda size: abs(math.log(size / page_bytes)))
        return self.choices[nearest]


def defaults() -> Calibration:
    """Safe on any machine, good on an H200 and an H100 over PCIe 5 (bench/bench_transfer.py).

    There staging carries pages of any size at 0.97 to 0.99 of a memcpy; the DMA engine alone comes
    to 0.92 with pages of 2 MiB. Eight programs fill the link but for the smallest pages
    (bench/bench_verification.py).
    """
    choices = {page: _default(programs) for page, programs in ((4 << 10, 16), (8 << 10, 8))}
    return Calibration(choices, "defaults; `kvortex tune` measures this machine")


def _default(programs: int) -> dict[Direction, Choice]:
    return {
        Direction.STORE: Choice(ZERO_COPY, STAGED, 4 << 20, 4 << 20, programs),
        Direction.LOAD: Choice(ZERO_COPY, STAGED, 32 << 20, 8 << 20, programs),
    }


def load_calibration(device: torch.device) -> Calibration:
    """What was measured for this GPU, link and driver, else the defaults. Never raises."""
    try:
        path = calibration_file()
        pages = json.loads(path.read_text()).get(machine_key(device), {})
        choices = {_page(page): _choices(pages[page]) for page in pages}
    except FileNotFoundError:
        return defaults()
    except Exception as error:  # noqa: BLE001  (a file that anybody may have written)
        logger.warning("The result of `kvortex tune` is ignored: %r", error)
        return defaults()
    return Calibration(choices, str(path)) if choices else defaults()


def save_calibration(
    device: torch.device, calibration: Calibration, speeds: Mapping[Direction, float]
) -> Path:
    """Add or replace this machine's choices in the user's cache folder; returns the file.

    Args:
        device: what was measured.
        calibration: its choices.
        speeds: GB/s of its link, for people; no choice depends on them.

    Raises:
        OSError: it cannot be written.
    """
    path = calibration_file()
    try:
        machines: dict[str, Any] = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        machines = {}  # there is none, or none that can be read
    machines[machine_key(device)] = {
        str(page): {direction.value: asdict(choice) for direction, choice in choices.items()}
        for page, choices in calibration.choices.items()
    }
    told = machines.get(SPEEDS)
    own = {machine_key(device): {way.value: speed for way, speed in speeds.items()}}
    machines[SPEEDS] = own if not isinstance(told, dict) else told | own
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(machines, indent=1))
    draft.replace(path)
    return path


def load_speeds() -> dict[Direction, float] | None:
    """GB/s of the first GPU's link as `kvortex tune` measured them here; None if it did not.

    Torch is imported only if there is something to look for.
    """
    try:
        machines = json.loads(calibration_file().read_text())[SPEEDS]
        import torch

        if not torch.cuda.is_available():
            return None
        measured = machines[machine_key(torch.device("cuda", 0))]
        speeds = {direction: float(measured[direction.value]) for direction in Direction}
    except Exception:  # noqa: BLE001  (a file that anybody may have written, or none)
        return None
    return speeds if all(0 < speed < math.inf for speed in speeds.values()) else None


def calibration_file() -> Path:
    """Where calibrations of this format are kept; XDG_CACHE_HOME is respected.

    Raises:
        RuntimeError: the user has no home folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kvortex" / f"tune-{FORMAT}.json"


def machine_key(device: torch.device) -> str:
    """Name of the GPU, its link and its driver."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} | {pcie_link(device)} | driver {_driver_version()}"


def pcie_link(device: torch.device) -> str:
    """Speed and width of the GPU's PCIe link at its best, as Linux names them for both its ends."""
    import torch

    found: Any = torch.cuda.get_device_properties(device)
    try:
        address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
        card = (Path("/sys/bus/pci/devices") / address).resolve(strict=True)
        ends = [end for end in (card, card.parent) if (end / "max_link_speed").exists()]
        speeds = [(end / "max_link_speed").read_text().strip() for end in ends]
        widths = [int((end / "max_link_width").read_text()) for end in ends]
        return f"{min(speeds, key=lambda speed: float(speed.split()[0]))} x{min(widths)}"
    except (OSError, AttributeError, ValueError, IndexError):
        return "unknown link"


def _driver_version() -> str:
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "unknown"
    return next((word for word in line.split() if word[0].isdigit() and "." in word), "unknown")


def _page(stored: str) -> int:
    page = int(stored)
    if not 1 <= page <= LARGEST_PAGE_BYTES:
        raise ValueError(f"pages of {stored} bytes")
    return page


def _choices(stored: dict[str, Any]) -> dict[Direction, Choice]:
    choices = {direction: Choice(**stored[direction.value]) for direction in Direction}
    for choice in choices.values():
        borders = (choice.from_bytes, choice.busy_from_bytes)
        if (
            not {choice.small, choice.large} <= {ZERO_COPY, STAGED, DMA}
            or any(type(number) is not int or number < 0 for number in borders)
            or type(choice.programs) is not int
            or not 1 <= choice.programs <= MOST_PROGRAMS
        ):
            raise ValueError(f"unknown choice {choice}")
    return choices
