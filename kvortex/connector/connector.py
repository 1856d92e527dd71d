"""KVortexConnector: vLLM's connector interface, answered by a SchedulerSide or a WorkerSide."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, cast

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

try:  # since vLLM 0.32
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    HOST = CacheHitSource.HOST
except ImportError:
    KVConnectorTransferResults = HOST = None

from kvortex.config import ROLE, KVortexConfig
from kvortex.connector.disk_namespace import bytes_last, keys_last, weights_are_known
from kvortex.connector.first_runner import FirstRunner
from kvortex.connector.geometry import geometry_of, unsupported
from kvortex.connector.hooks import hooked_layers
from kvortex.connector.messages import PlanMessage, ReportMessage
from kvortex.connector.scheduler_side import SchedulerSide
from kvortex.connector.second_runner import SecondRunner
from kvortex.connector.stats import Changes, KVortexPromMetrics, KVortexStats
from kvortex.connector.worker_side import WorkerSide
from kvortex.core import ConfigError, KVortexError
from kvortex.doubts import small_disk
from kvortex.free_memory import require_free_memory
from kvortex.plugins import load_admission, load_policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvortex.connector.host_events import HostEvents
    from kvortex.connector.model_runner import ModelRunner
    from kvortex.core import StepPlan

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def _telling_why_not() -> Iterator[None]:
    """Whatever KVortex refuses is one line in the log: vLLM shows it below many of its own."""
    try:
        yield
    except KVortexError as error:
        logger.error("KVortex cannot start: %s", error)
        raise


class KVortexConnector(KVConnectorBase_V1, SupportsHMA):
    """Built by vLLM once in the scheduler's process and once in each worker's.

    Supports vLLM 0.26 to 0.33. A model whose KV cache cannot be offloaded runs as if there were
    no connector, and the log says why.
    """

    _cache_hit_source = HOST  # under which vLLM's metrics count our hits

    @_telling_why_not()
    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_like_vllm()
        extra = self._kv_transfer_config.kv_connector_extra_config
        self._config = _checked_config(extra)
        _require_both_ways(self._kv_transfer_config.kv_role)
        _require_news_of_sleep(vllm_config)
        self._geometry = None
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._changes = Changes()
        self._events: HostEvents | None = None
        reason = unsupported(vllm_config, kv_cache_config)
        if reason is None:
            self._geometry = geometry_of(vllm_config, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            self._warn(reason)
            if self._geometry is not None:
                self._scheduler = SchedulerSide(
                    self._config,
                    self._geometry,
                    outlives=self._outlives(vllm_config),
                    runner=_runner_to_tell(vllm_config),
                )
                told = vllm_config.kv_events_config
                if told is not None and told.enable_kv_cache_events:
                    self._events = self._scheduler.tell_events()

    # Both sides

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What changed of the scheduler side's counters and gauges."""
        if self._scheduler is None:
            return None
        return self._changes.take(self._scheduler.offload.counters, self._scheduler.gauges)

    def shutdown(self) -> None:
        """Give memory and streams back. May be called twice."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self._scheduler is not None:
            self._scheduler.close()

    # Worker side, in the order of a step

    @_telling_why_not()
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Open the host pool for these tensors."""
        if self._geometry is None:
            return
        self._worker = WorkerSide(self._config, self._geometry, kv_caches, self._vllm_config)

    def unregister_kv_caches(self) -> None:
        """vLLM takes the KV cache's memory away, to sleep; since 0.33."""
        if self._worker is not None:
            self._worker.sleep()

    def restore_kv_caches(self) -> None:
        """vLLM woke up."""
        if self._worker is not None:
            self._worker.wake_up()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Start this step's loads. The model's stream waits for those that the forward needs."""
        if self._worker is not None:
            self._worker.worker.begin(self._plan(), hooked_layers(forward_context))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Let the model's stream wait for what this layer is about to read."""
        if self._worker is not None:
            self._worker.worker.pass_layer(layer_name)

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Nothing: whole blocks are stored in `wait_for_save`."""

    def wait_for_save(self) -> None:
        """Start this step's stores, behind the model on the GPU; does not wait."""
        if self._worker is not None:
            self._worker.worker.store()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose load has arrived; stores are reported by block."""
        if self._worker is None:
            return None, None
        return None, self._worker.worker.take_arrived() or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """As `get_finished`, and which of them failed; vLLM asks so since 0.32."""
        results = KVConnectorTransferResults()
        if self._worker is not None:
            results.finished_recving = self._worker.worker.take_arrived()
            results.failed_recving = self._worker.take_failed_requests()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """GPU blocks that vLLM must compute again; known once it looks (see BadBlocks)."""
        if self._worker is None:
            return set()
        return cast("set[int]", self._worker.take_bad_blocks())

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What this rank finished, for `update_connector_output`."""
        if self._worker is None:
            return None
        report = self._worker.worker.report()
        return ReportMessage(report) if report else None

    # Scheduler side, in the order of a step

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Where source blocks of stores are held."""
        if self._scheduler is not None:
            self._scheduler.bind_gpu_block_pool(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        """Begin to bring what it needs from disk, while it waits for its turn."""
        if self._scheduler is not None:
            self._scheduler.arrived(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens worth loading, and whether the request waits for them while others run."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Plan the load into the request's blocks."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """This step's plan."""
        if self._scheduler is None:
            return PlanMessage()
        plan = self._scheduler.plan(scheduler_output)
        if plan.loads:  # else vLLM starts them behind the forward, and they would wait for it
            scheduler_output.has_sync_kv_loads = True
        return PlanMessage(plan)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take in what the workers finished."""
        if self._scheduler is not None:
            self._scheduler.settle(connector_output)

    def take_events(self) -> Iterable[KVCacheEvent]:
        """What came to host memory and what left it, for routers; none unless vLLM tells events."""
        return self._events.take() if self._events is not None else ()

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The request's blocks may be freed: stores hold those they read.

        An answer that is not streamed has the explanation in its `kv_transfer_params`, if asked.
        """
        told = self._scheduler.finished(request) if self._scheduler is not None else None
        return False, {"kvortex": told.as_dict()} if told is not None else None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`."""
        return self.request_finished(request, [])

    def has_pending_push_work(self) -> bool:
        """Keep the engine stepping, so that transfers are noticed when they end."""
        return self._scheduler is not None and self._scheduler.offload.pending

    def has_pending_block_frees(self) -> bool:
        """Whether GPU blocks will be free as soon as stores have ended."""
        return self._scheduler is not None and self._scheduler.frees_blocks

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: no request depends on its stores."""
        return False

    def reset_cache(self) -> bool | None:
        """Forget every block, in memory and under way."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # Asked of the class, before there is an engine

    @classmethod
    @_telling_why_not()
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """No. As vLLM asks this first, a bad configuration is refused here, before any loading."""
        config = _checked_config(extra_config)
        require_free_memory(config.ram_pool_gb, config.ram_pool_bytes)
        return False

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        """Counters as they came over the wire."""
        return KVortexStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """Counters for /metrics."""
        return KVortexPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _outlives(self, vllm_config: VllmConfig) -> bool:
        """Whether a disk is of use after a restart; says what to do if not."""
        if self._config.disk_path is None:
            return True
        if not bytes_last(vllm_config):
            logger.warning(
                "disk_path: calculate_kv_scales finds the KV cache's scales anew at each start, so "
                "nothing on disk is of use after a restart; take them from the checkpoint."
            )
            return False
        if not weights_are_known(vllm_config):
            logger.warning(
                "disk_path: the files of this model's weights are not to be seen here, so nothing "
                "on disk is used after a restart: they might be others. --revision vouches for "
                "them."
            )
            return False
        if not keys_last(vllm_config):
            logger.warning(
                "disk_path: this vLLM names blocks anew at every start, so nothing will be found "
                "on disk after a restart; start it with PYTHONHASHSEED=0 in its environment."
            )
            return False
        return True

    def _plan(self) -> StepPlan:
        message = self._get_connector_metadata()
        assert isinstance(message, PlanMessage)
        return message.plan

    def _warn(self, reason: str | None) -> None:
        if (doubt := small_disk(self._config)) is not None:
            logger.warning("%s", doubt)
        if reason is not None:
            logger.warning("KVortex is off for this model: %s.", reason)
        elif self._kv_transfer_config.kv_load_failure_policy != "recompute":
            logger.warning(
                "kv_load_failure_policy is 'fail': a failed load ends its request with an error; "
                "set it to 'recompute' to have the tokens computed instead."
            )


def _checked_config(extra: dict[str, Any] | None) -> KVortexConfig:
    """Raises ConfigError for a bad setting or an unknown policy."""
    config = KVortexConfig.from_extra_config(extra)
    load_policy(config.eviction_policy, capacity=1)
    load_admission(config.admission, capacity=1)
    return config


def _runner_to_tell(vllm_config: VllmConfig) -> ModelRunner | None:
    """vLLM's model runner, unless that sees for itself which requests went back."""
    if getattr(vllm_config, "use_v2_model_runner", False):
        return SecondRunner(vllm_config)
    ahead = vllm_config.scheduler_config.async_scheduling
    lacks_images = vllm_config.model_config.is_multimodal_model  # of what was to be loaded
    return FirstRunner(vllm_config) if ahead or lacks_images else None


def _require_both_ways(role: str | None) -> None:
    """Raises ConfigError where vLLM was told that blocks only leave, or only come."""
    if role != ROLE:
        raise ConfigError(f"kv_role={role!r}: KVortex stores and loads; write kv_role={ROLE!r}")


def _require_news_of_sleep(vllm_config: VllmConfig) -> None:
    """Raises ConfigError where vLLM would take the KV cache's memory away and not say so."""
    sleeps = vllm_config.model_config is not None and vllm_config.model_config.enable_sleep_mode
    if sleeps and not hasattr(KVConnectorBase_V1, "unregister_kv_caches"):
        raise ConfigError(
            "enable_sleep_mode=True: KVortex can sleep from vLLM 0.33 on only; turn it off"
        )


def _log_like_vllm() -> None:
    """vLLM gives handlers to its own logger only; ours would be silent below warnings."""
    own, theirs = logging.getLogger("kvortex"), logging.getLogger("vllm")
    if not own.handlers and theirs.handlers:
        own.handlers = list(theirs.handlers)
        own.setLevel(theirs.getEffectiveLevel())
        own.propagate = False
