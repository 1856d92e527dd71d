"""SchedulerSide: turns what vLLM schedules into loads and stores of (key, block) pairs."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvortex.config import slots_in_pool
from kvortex.connector.adapters import Adapters
from kvortex.connector.explanation import explain
from kvortex.connector.gpu_blocks import GpuBlocks
from kvortex.connector.host_events import HostEvents
from kvortex.connector.load_planner import LoadPlanner
from kvortex.connector.messages import ReportMessage
from kvortex.connector.prefetcher import Prefetcher
from kvortex.connector.setbacks import Setbacks
from kvortex.connector.store_planner import StorePlanner
from kvortex.connector.tracked_requests import TrackedRequests
from kvortex.connector.turns import Turns
from kvortex.core import Direction, StepPlan, StepReport
from kvortex.cost_model import CostModel
from kvortex.disk import disk_slots_in_pool
from kvortex.disk.pace import require_pace
from kvortex.metrics import Gauges, MissReason
from kvortex.plugins import load_admission, load_policy
from kvortex.recorder import Recorder
from kvortex.scheduler import OffloadScheduler
from kvortex.step_clock import StepClock
from kvortex.tiers import HostTier

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvortex.config import KVortexConfig
    from kvortex.connector.explanation import Explanation
    from kvortex.connector.geometry import Geometry
    from kvortex.connector.model_runner import ModelRunner
    from kvortex.connector.tracked_request import TrackedRequest
    from kvortex.scheduler import Flight

logger = logging.getLogger(__name__)

FAILED_STATUS = "FINISHED_ERROR"


class SchedulerSide:
    """One per vLLM scheduler; called on its thread only.

    It tells those that it holds what happens, and asks them what to load, what to store and who
    waits. None of them knows of it.

    Args:
        config: of the connector.
        geometry: of the KV cache.
        outlives: whether what is on disk can be found, and is right, after a restart.
        runner: vLLM's, if that has to be told of requests that go back.

    Raises:
        ConfigError: a pool without a slot, a policy that is not installed, a trace that cannot be
            written, a limit of writing that lets nothing be written.
    """

    def __init__(
        self,
        config: KVortexConfig,
        geometry: Geometry,
        *,
        outlives: bool = True,
        runner: ModelRunner | None = None,
    ) -> None:
        ranks = geometry.num_ranks
        host = _tier(config, slots_in_pool(config, geometry.slot_bytes, ranks))
        disk = None
        if config.disk_pool_gb is not None:
            disk_slots = disk_slots_in_pool(config.disk_pool_gb, geometry.slot_bytes, ranks)
            require_pace(config.disk_max_write_mb_s, geometry.slot_bytes * ranks)
            disk = _tier(config, disk_slots)
        self.offload = OffloadScheduler(
            host, ranks, geometry.slot_bytes, disk, config.disk_write_bytes_per_s
        )
        self.costs = CostModel(geometry.slot_bytes * len(geometry.reaches) / geometry.block_tokens)
        self._reaches = geometry.reaches
        self._block_tokens = geometry.block_tokens
        self._turns = Turns()
        self._loads = LoadPlanner(config, geometry, host.readable, self.costs, self._turns)
        self._prefetcher: Prefetcher | None = None
        overflow = self.offload.overflow
        if overflow is not None:
            self._prefetcher = Prefetcher(config, overflow, self._loads, self.offload.counters)
            if not outlives:
                overflow.disown()
        adapters = Adapters() if overflow is not None else None
        self._tracked = TrackedRequests(len(geometry.reaches), adapters)
        self._gpu = GpuBlocks()
        self._stores = StorePlanner(self.offload, self._gpu, geometry)
        self._setbacks = Setbacks(self._tracked, self._gpu, geometry.block_tokens, runner)
        self._clock = StepClock()
        self._recorder = _open_recorder(config, geometry)
        self._store_bytes_per_s: float | None = None

    def tell_events(self) -> HostEvents:
        """Collect from now on what becomes readable in host memory, and what no longer is."""
        events = HostEvents(self._block_tokens)
        self.offload.tier.index.on_change = events.note
        return events

    def bind_gpu_block_pool(self, pool: BlockPool) -> None:
        """Before this nothing is stored."""
        self._gpu.bind(pool)

    @property
    def frees_blocks(self) -> bool:
        """Whether a store under way is the last holder of a GPU block."""
        return self._gpu.frees_any

    @property
    def gauges(self) -> Gauges:
        """How things stand."""
        index, overflow = self.offload.tier.index, self.offload.overflow
        gauges = Gauges(
            slots=index.num_slots,
            resident_slots=index.resident,
            quarantined_slots=index.quarantined,
            transfers_under_way=self.offload.num_pending,
            prefill_tokens_per_second=self.costs.prefill_tokens_per_s or 0.0,
            load_bytes_per_second=self.costs.load_bytes_per_s or 0.0,
            store_bytes_per_second=self._store_bytes_per_s or 0.0,
        )
        if overflow is None:
            return gauges
        return replace(
            gauges,
            disk_slots=overflow.disk.index.num_slots,
            disk_resident_slots=overflow.disk.index.resident,
            disk_read_bytes_per_second=overflow.fetches.bytes_per_s,
            disk_reading_off=overflow.reading_off,
            disk_writing_off=overflow.writing_off,
        )

    def arrived(self, request: Request) -> None:
        """vLLM has a new request, which waits for its turn: bring what it needs from disk."""
        if self._prefetcher is not None and not request.skip_reading_prefix_cache:
            tracked = self._tracked.of(request)
            tracked.first = self._gpu.count_cached(request.block_hashes, len(self._reaches))
            self._loads.look(tracked)
            self._prefetcher.begin(tracked)

    def match(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens after the computed ones to load, and whether the request waits for them apart.

        Whole blocks, and one token is left to compute. None: to be asked again in a later step,
        while blocks come from disk. vLLM may ask more than once anyway.
        """
        if self._turns.gives_way(request.request_id):
            return None, False
        if request.skip_reading_prefix_cache or num_computed_tokens % self._block_tokens:
            return 0, False
        tracked = self._tracked.of(request)
        tracked.first = num_computed_tokens // self._block_tokens
        self._loads.look(tracked)
        if self._prefetcher is not None and self._prefetcher.holds_back(tracked):
            return None, False
        return self._loads.choose(tracked), tracked.apart

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """vLLM gave the request its blocks, and runs it in this step or once its load is there."""
        tracked = self._tracked.of(request)
        tracked.block_ids = [list(ids) for ids in blocks.get_block_ids()]
        tracked.considered = tracked.computed = 0
        if request.num_computed_tokens == tracked.first == num_external_tokens == 0:
            tracked.stale = False
        if not tracked.touched:  # to be resumed, or scheduled once loaded, is not a second use
            tracked.touched = True
            self._explain(tracked, num_external_tokens)
            self._touch(tracked)
            self._record(tracked, num_external_tokens)
        self._turns.comes()
        self.offload.counters.unpaid_tokens += tracked.unpaid
        self.offload.counters.hit_tokens += num_external_tokens
        tracked.unpaid = 0
        if num_external_tokens:
            self._load(tracked, num_external_tokens)
        self._end_fetch(request.request_id, num_external_tokens)

    def plan(self, output: SchedulerOutput) -> StepPlan:
        """Plan to store every block that this step completes."""
        rows = self._tracked.advance(output)
        self._setbacks.mend(output)
        self._stores.store(rows)
        self._turns.ran(output.num_scheduled_tokens.keys())
        num_tokens = output.total_num_scheduled_tokens
        awaited = self._loads.take_awaited()
        # A step without tokens says nothing, and one that waits for a load nothing of prefill.
        step = self._clock.begin(0 if awaited else num_tokens) if num_tokens else None
        if step is not None:
            self._setbacks.begin(step, rows, waits=awaited > 0)
        by_layer = awaited > 0 and self.costs.hides(awaited, num_tokens)
        return self.offload.take_plan(num_tokens > 0, by_layer, step)

    def finished(self, request: Request) -> Explanation | None:
        """Store what only its last tokens completed, before vLLM frees the blocks.

        Returns what became of its prompt, if its client asked for that.
        """
        self._turns.gone(request.request_id)
        tracked = self._tracked.pop(request.request_id, None)
        self._end_fetch(request.request_id)
        if tracked is not None and request.status.name != FAILED_STATUS:
            computed = min(request.num_computed_tokens, tracked.computed)
            self._stores.store([(tracked, tracked.block_ids, computed, computed)])
        return tracked.explanation if tracked is not None and tracked.params.explain else None

    def settle(self, output: KVConnectorOutput) -> None:
        """Take in the workers' report of a step."""
        message = output.kv_connector_worker_meta
        report = message.report if isinstance(message, ReportMessage) else StepReport()
        self._setbacks.settle(report.step, output.invalid_block_ids)
        if output.invalid_block_ids:  # maybe of another connector's load, beside this one
            self.offload.discard_stores()
            self._stores.rewind(self._tracked.values())
        self._learn(report)
        for flight in self.offload.settle(report):
            if flight.direction is Direction.STORE:
                self._stores.ended(flight.job)
            else:
                self._end_load(flight)

    def reset(self) -> None:
        """Forget everything, and store nothing more of what was computed before."""
        self.offload.reset()
        for tracked in self._tracked.values():
            tracked.stale = True

    def close(self) -> None:
        """End the trace, if one is recorded."""
        if self._recorder is not None:
            self._recorder.close()

    def _learn(self, report: StepReport) -> None:
        """How fast this machine computes, loads and stores."""
        if report.step is not None:
            self.costs.observe_step(*self._clock.end(report.step))
        if report.load_bytes_per_s is not None:
            self.costs.load_bytes_per_s = report.load_bytes_per_s
        if report.store_bytes_per_s is not None:
            self._store_bytes_per_s = report.store_bytes_per_s

    def _end_load(self, flight: Flight) -> None:
        self._loads.ended(flight.job)
        waited = flight.job.request_id
        if waited is not None and waited in self._tracked:
            self._turns.loaded(waited)
        if flight.failed:
            lost = round(self._loads.tokens(len(flight.blocks) - min(flight.bad)))
            self.offload.counters.miss(MissReason.FAILED, lost)
            self._stores.rewind(self._tracked.values())

    def _explain(self, tracked: TrackedRequest, num_loaded: int) -> None:
        """Count why tokens of a request are computed; log it where somebody wants to know."""
        told = explain(tracked, num_loaded, self.offload, self._block_tokens)
        tracked.explanation = told
        for reason, tokens in told.missed_tokens.items():
            self.offload.counters.miss(reason, tokens)
        level = logging.INFO if tracked.params.explain else logging.DEBUG
        logger.log(level, "Request %s: %s.", tracked.request.request_id, told)

    def _record(self, tracked: TrackedRequest, num_external_tokens: int) -> None:
        """Note a request that is seen for the first time, and who serves its blocks."""
        if self._recorder is None:
            return
        request, size = tracked.request, self._block_tokens
        keys = tracked.keys(0, 0, request.num_prompt_tokens // size)
        hits = {"gpu": tracked.first, "host": num_external_tokens // size}
        now = time.monotonic()
        self._recorder.record(request.request_id, keys, hits, request.num_prompt_tokens, now)

    def _load(self, tracked: TrackedRequest, num_tokens: int) -> None:
        """Plan to fill what every group needs of the tokens after the first missing block."""
        keys, block_ids = self._loads.blocks(tracked, num_tokens)
        request_id = tracked.request.request_id if tracked.apart else None
        job = self.offload.load(keys, block_ids, request_id)
        if job is not None:
            self._loads.began(job)

    def _touch(self, tracked: TrackedRequest) -> None:
        last = tracked.request.num_tokens // self._block_tokens
        for group in range(len(self._reaches)):
            self.offload.touch(tracked.keys(group, 0, last))

    def _end_fetch(self, request_id: str, num_loaded: int = 0) -> None:
        """What came from disk for a request need not be held for it any more."""
        if self._prefetcher is not None:
            fetched = self._prefetcher.end(request_id) * self._block_tokens // len(self._reaches)
            self.offload.counters.disk_hit_tokens += min(fetched, num_loaded)


def _tier(config: KVortexConfig, num_slots: int) -> HostTier:
    return HostTier(
        num_slots,
        load_policy(config.eviction_policy, num_slots),
        load_admission(config.admission, num_slots),
    )


def _open_recorder(config: KVortexConfig, geometry: Geometry) -> Recorder | None:
    """Raises ConfigError where the file cannot be written."""
    if config.trace_path is None:
        return None
    block_bytes = geometry.slot_bytes * geometry.num_ranks
    return Recorder(Path(config.trace_path).expanduser(), geometry.block_tokens, block_bytes)
