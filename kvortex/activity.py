"""Activity and State of KVortex in a server, as the server's /metrics tell them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvortex.scrape import Scrape

OURS = "vllm:kvortex_"
FAILURES = (
    "failed_stores",
    "failed_loads",
    "corrupt_blocks",
    "disk_failed_writes",
    "disk_failed_reads",
    "disk_late_reads",
    "disk_slow_blocks",
    "disk_corrupt_blocks",
    "disk_distrusted_blocks",
    "disk_times_off",
    "discarded_stores",
    "lost_slots",
    "unwaited_layers",
)


@dataclass(frozen=True, slots=True)
class Activity:
    """Of one span of time, or since the server's start. Tokens are those of prompts."""

    asked_tokens: float
    gpu_tokens: float
    host_tokens: float
    disk_tokens: float
    missed_tokens: dict[str, float]
    """In whole blocks, by reason; the ends of prompts are computed in any case."""
    loaded_bytes: float
    stored_bytes: float
    disk_read_bytes: float
    disk_written_bytes: float
    evicted_blocks: float
    not_admitted_blocks: float
    refused_blocks: float
    saved_seconds: float
    """Of prefill, at its measured speed."""
    load_seconds: float
    """From the plan of each load to its end; most of it passes beside other work."""
    unpaid_tokens: float
    apart_loads: float
    layered_loads: float
    failures: dict[str, float]

    @classmethod
    def of(cls, scrape: Scrape) -> Activity:
        """Whatever its totals hold."""

        def ours(name: str) -> float:
            return scrape.total(f"{OURS}{name}_total")

        return cls(
            asked_tokens=scrape.total("vllm:prefix_cache_queries_total"),
            gpu_tokens=scrape.total("vllm:prefix_cache_hits_total"),
            host_tokens=ours("hit_tokens") - ours("disk_hit_tokens"),
            disk_tokens=ours("disk_hit_tokens"),
            missed_tokens=scrape.by(OURS + "missed_tokens_total", "reason"),
            loaded_bytes=ours("loaded_bytes"),
            stored_bytes=ours("stored_bytes"),
            disk_read_bytes=ours("disk_read_bytes"),
            disk_written_bytes=ours("disk_written_bytes"),
            evicted_blocks=ours("evicted_blocks"),
            not_admitted_blocks=ours("not_admitted"),
            refused_blocks=ours("refused_stores"),
            saved_seconds=scrape.quotient(
                OURS + "hit_tokens_total", OURS + "prefill_tokens_per_second"
            ),
            load_seconds=ours("load_seconds"),
            unpaid_tokens=ours("unpaid_tokens"),
            apart_loads=ours("apart_loads"),
            layered_loads=ours("layered_loads"),
            failures={name: ours(name) for name in FAILURES},
        )


@dataclass(frozen=True, slots=True)
class State:
    """As a server stands."""

    running: float
    waiting: float
    slots: float
    resident_slots: float
    disk_slots: float
    disk_resident_slots: float
    transfers_under_way: float
    prefill_tokens_per_second: float
    load_bytes_per_second: float
    store_bytes_per_second: float
    disk_read_bytes_per_second: float
    disk_reading_off: float
    """Ranks that do not read from disk for now, as their drive fails."""
    disk_writing_off: float

    @classmethod
    def of(cls, scrape: Scrape) -> State:
        """Of all engines together."""

        def ours(name: str) -> float:
            return scrape.total(OURS + name)

        return cls(
            running=scrape.total("vllm:num_requests_running"),
            waiting=scrape.total("vllm:num_requests_waiting"),
            slots=ours("slots"),
            resident_slots=ours("resident_slots"),
            disk_slots=ours("disk_slots"),
            disk_resident_slots=ours("disk_resident_slots"),
            transfers_under_way=ours("transfers_under_way"),
            prefill_tokens_per_second=ours("prefill_tokens_per_second"),
            load_bytes_per_second=ours("load_bytes_per_second"),
            store_bytes_per_second=ours("store_bytes_per_second"),
            disk_read_bytes_per_second=ours("disk_read_bytes_per_second"),
            disk_reading_off=ours("disk_reading_off"),
            disk_writing_off=ours("disk_writing_off"),
        )
