"""WorkerSide: opens the pool and the copy engine once vLLM's KV tensors exist. One per rank."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvortex.engine import slots_in_pool
from kvortex.host_pool import GIB, HostPool, require_free_memory
from kvortex.layout import make_layout
from kvortex.worker import Worker, open_copy_engine

if TYPE_CHECKING:
    import torch

    from kvortex.config import KVortexConfig
    from kvortex.connector.geometry import Geometry

logger = logging.getLogger(__name__)


class WorkerSide:
    """The rank's share of the host pool, and the worker that fills it."""

    def __init__(
        self, config: KVortexConfig, geometry: Geometry, kv_caches: dict[str, torch.Tensor]
    ) -> None:
        own = {name: kv_caches[name] for name in geometry.layer_names if name in kv_caches}
        layout = make_layout(own, geometry.num_gpu_blocks)
        num_slots = slots_in_pool(config, geometry.slot_bytes, geometry.num_ranks)
        size = num_slots * layout.slot_bytes
        require_free_memory(config.ram_pool_gb, size)
        self._pool = HostPool(num_slots, layout.slot_bytes, pinned=layout.device.type == "cuda")
        self.worker = Worker(open_copy_engine(layout, self._pool, config.num_cuda_streams))
        logger.info(
            "KVortex: %.1f GiB of host RAM hold %d blocks, %d tokens, against %d tokens on %s",
            size / GIB,
            num_slots,
            num_slots * geometry.block_tokens,
            geometry.num_gpu_blocks * geometry.block_tokens,
            layout.device,
        )

    def close(self) -> None:
        """Let copies end and give the memory back."""
        self.worker.close()
        self._pool.close()
