"""Counters and gauges: what one scheduler side has done, and how it stands, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

DISK = "disk_"
"""Begins the name of each counter of the disk."""
MISSED = "missed_"
"""Begins the name of each counter of misses; the reason follows."""


class MissReason(StrEnum):
    """Why tokens of a prompt were computed, by the first block that could not be had."""

    NEVER_STORED = "never_stored"
    """Nobody asked for them before, or so long ago that it is forgotten."""
    NOT_ADMITTED = "not_admitted"
    """The admission filter did not expect this use."""
    NO_SLOT = "no_slot"
    """Every slot was in use by a transfer when they were to be stored."""
    EVICTED = "evicted"
    IN_FLIGHT = "in_flight"
    """Their store had not ended."""
    LATE = "late"
    """They are on disk, and were not in the host in time or found no room there."""
    FAILED = "failed"
    """A store, a load or a read from disk failed."""
    NOT_WORTH_LOADING = "not_worth_loading"
    """It was faster to compute them."""
    LIMIT = "limit"
    """The request asked that they be computed."""


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
    """Blocks whose load failed; corrupt ones are among them."""
    corrupt_blocks: int = 0
    """Loads of a block that gave back other bytes than were stored; they are computed again."""
    discarded_stores: int = 0
    """Stores whose bytes arrived but could no longer be trusted or wanted."""
    refused_stores: int = 0
    """Blocks not stored because every slot was in use by a transfer, or quarantined."""
    not_admitted: int = 0
    """Blocks not stored because the admission filter expects no second use."""
    hit_tokens: int = 0
    """Tokens that were to be loaded instead of computed, also those that did not arrive."""
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
    disk_survivors: int = 0
    """Blocks found on disk at start."""
    disk_written_blocks: int = 0
    disk_written_bytes: int = 0
    disk_read_blocks: int = 0
    disk_read_bytes: int = 0
    disk_read_seconds: float = 0.0
    """From a fetch's plan to its last block."""
    disk_failed_writes: int = 0
    """Blocks that a drive failed to write; what came too late, or was not tried, is counted by
    `disk_slow_blocks` and `disk_refused_blocks` only."""
    disk_failed_reads: int = 0
    """Blocks that the disk did not give back as they were written; they are computed again."""
    disk_distrusted_blocks: int = 0
    """Blocks on disk that are not served again: as they were loaded, they were not what was
    stored."""
    disk_late_reads: int = 0
    """Requests that were computed because their blocks took too long to come from disk."""
    disk_not_admitted: int = 0
    """Times that the admission filter held a block to be not worth a write."""
    disk_missed_writes: int = 0
    """Blocks that left the host before their turn to be written."""
    disk_hit_tokens: int = 0
    """Of `hit_tokens`, those that were fetched from disk."""
    disk_corrupt_blocks: int = 0
    """Like all that follow up to the misses, counted by each rank for itself: blocks that were read
    and are not what was written."""
    disk_stale_blocks: int = 0
    """Asked for in a slot that holds another key or none; at start, older copies of a key."""
    disk_invalid_records: int = 0
    """Found at start: torn, moved, or somebody else's."""
    disk_read_errors: int = 0
    """Blocks that a drive failed to read."""
    disk_write_errors: int = 0
    disk_slow_blocks: int = 0
    """Blocks that a drive did not read by their deadline, or not write in time; counted as soon as
    that is so."""
    disk_refused_blocks: int = 0
    """Blocks that were not tried: the drive is off, behind, or may not be written faster."""
    disk_times_off: int = 0
    """How often reading or writing was switched off after errors."""
    disk_removed_caches: int = 0
    """Caches of other models that made room at start."""
    missed_never_stored: int = 0
    """Like all that follow, tokens in whole blocks of a prompt that were computed (MissReason)."""
    missed_not_admitted: int = 0
    missed_no_slot: int = 0
    missed_evicted: int = 0
    missed_in_flight: int = 0
    missed_late: int = 0
    missed_failed: int = 0
    missed_not_worth_loading: int = 0
    missed_limit: int = 0

    def miss(self, reason: MissReason, tokens: int) -> None:
        """Count tokens that were computed."""
        name = MISSED + reason
        setattr(self, name, getattr(self, name) + tokens)

    def count_disks(self, counted: Mapping[str, int]) -> None:
        """Add what the ranks' disks counted, by name without `disk_`."""
        for name, number in counted.items():
            setattr(self, DISK + name, getattr(self, DISK + name) + number)

    def as_dict(self) -> dict[str, int | float]:
        """Name to number; `asdict` would take twenty times as long, twice a step."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Gauges:
    """As things stand. Speeds are measured ones, 0 before there is a measure.

    Those of transfers are of large ones of late, on the slowest rank, whatever ran beside them.
    """

    slots: int = 0
    resident_slots: int = 0
    quarantined_slots: int = 0
    """Of the host pool, given to nobody any more: what they held came back corrupt."""
    transfers_under_way: int = 0
    prefill_tokens_per_second: float = 0.0
    load_bytes_per_second: float = 0.0
    store_bytes_per_second: float = 0.0
    disk_slots: int = 0
    disk_resident_slots: int = 0
    disk_read_bytes_per_second: float = 0.0
    disk_reading_off: int = 0
    """Ranks that do not read from disk, as their drive fails; tried again from time to time."""
    disk_writing_off: int = 0
    """The same of writing."""

    def as_dict(self) -> dict[str, int | float]:
        """Name to number; `asdict` would take twenty times as long, twice a step."""
        return {name: getattr(self, name) for name in self.__slots__}
