"""Counters: what one scheduler side has done so far, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    """All in blocks, since start; a block is counted when its transfer ended."""

    stored_blocks: int = 0
    loaded_blocks: int = 0
    failed_stores: int = 0
    failed_loads: int = 0
    discarded_stores: int = 0
    """Stores whose bytes arrived but could no longer be trusted or wanted."""
    refused_stores: int = 0
    """Blocks not stored because every slot was in use by a transfer."""

    not_admitted: int = 0
    """Blocks not stored because the admission filter expects no second use."""

    unwaited_layers: int = 0
    """Layers that ran before their load was known to have ended; none ever should."""

    def as_dict(self) -> dict[str, int]:
        """Name to number."""
        return asdict(self)
