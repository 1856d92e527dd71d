"""Counters and gauges: what one scheduler side has done, and how it stands, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    """Since start. A block, with its bytes and seconds, is counted when its transfer ended.

    Bytes are those of all ranks. Seconds are from the plan of a transfer to the report of its end,
    which a step of the engine separates at least.
    """

    stored_blocks: int = 0
    loaded_blocks: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    store_seconds: float = 0.0
    load_seconds: float = 0.0
    evicted_blocks: int = 0
    failed_stores: int = 0
    failed_loads: int = 0
    discarded_stores: int = 0
    """Stores whose bytes arrived but could no longer be trusted or wanted."""
    refused_stores: int = 0
    """Blocks not stored because every slot was in use by a transfer."""
    not_admitted: int = 0
    """Blocks not stored because the admission filter expects no second use."""
    hit_tokens: int = 0
    """Tokens that were loaded instead of computed."""
    unpaid_tokens: int = 0
    """Tokens that could have been loaded, had it not been faster to compute them."""
    apart_loads: int = 0
    """Loads for which a request waited while others ran."""
    layered_loads: int = 0
    """Steps in which each layer of the model waited for its own part of the loads."""
    lost_slots: int = 0
    """Slots of the pool for which a rank had no memory."""
    unwaited_layers: int = 0
    """Layers that ran before their load was known to have ended; none ever should."""

    def as_dict(self) -> dict[str, int | float]:
        """Name to number."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Gauges:
    """As things stand. Speeds are measured ones, 0 before there is a measure."""

    slots: int = 0
    resident_slots: int = 0
    transfers_under_way: int = 0
    prefill_tokens_per_second: float = 0.0
    load_bytes_per_second: float = 0.0

    def as_dict(self) -> dict[str, int | float]:
        """Name to number."""
        return asdict(self)
