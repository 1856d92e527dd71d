"""PcieLink: how fast and wide a GPU's link is and could be, as Linux tells for both its ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
"""By GT/s of a lane."""
CODING = {1: 0.8, 2: 0.8}
"""Share of the bits that is data: 8 of 10; in later generations 128 of 130."""


@dataclass(frozen=True, slots=True)
class PcieLink:
    """Generation and number of lanes."""

    gt_s: float
    width: int

    @property
    def gb_s(self) -> float:
        """Bytes that it could carry each way, of which packet headers take about an eighth."""
        coding = CODING.get(GENERATIONS.get(self.gt_s, 0), 128 / 130)
        return self.gt_s * self.width * coding / 8

    def __str__(self) -> str:
        generation = GENERATIONS.get(self.gt_s)
        return f"PCIe {generation or f'at {self.gt_s:g} GT/s'} x{self.width}"


def link_now(card: Path) -> PcieLink:
    """As it is at this moment: an idle GPU lowers its speed.

    Args:
        card: the GPU's folder under /sys/bus/pci/devices, resolved.

    Raises:
        OSError, ValueError, IndexError: the machine does not tell.
    """
    return _read(card, "current")


def link_possible(card: Path) -> PcieLink:
    """What both of its ends can do; errors as above."""
    ends = [end for end in (card, card.parent) if (end / "max_link_speed").exists()]
    links = [_read(end, "max") for end in ends or [card]]
    return PcieLink(min(link.gt_s for link in links), min(link.width for link in links))


def _read(end: Path, when: str) -> PcieLink:
    speed = float((end / f"{when}_link_speed").read_text().split()[0])
    width = int((end / f"{when}_link_width").read_text())
    if speed <= 0 or not 0 < width <= 32:
        raise ValueError(f"a link of {speed} GT/s and {width} lanes")
    return PcieLink(speed, width)
