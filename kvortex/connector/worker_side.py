"""WorkerSide: opens the pool and the copy engine once vLLM's KV tensors exist. One per rank."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

import torch
from vllm.distributed.parallel_state import get_world_group

from kvortex.config import GIB
from kvortex.engine import slots_in_pool
from kvortex.host_pool import free_memory_bytes, open_pool, require_free_memory
from kvortex.layout import make_layout
from kvortex.worker import open_copy_engine, open_worker

if TYPE_CHECKING:
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
        self._layout = layout
        self._names_blocks = geometry.names_failed_blocks
        self._num_streams = config.num_cuda_streams
        self._asleep = False
        num_slots = slots_in_pool(config, geometry.slot_bytes, geometry.num_ranks)
        size = num_slots * layout.slot_bytes
        free, ranks = _memory_of_all_ranks()
        require_free_memory(config.ram_pool_gb, size * ranks, free)
        self._pool = open_pool(config, layout, num_slots)
        self.worker = open_worker(layout, self._pool, config.num_cuda_streams)
        logger.info(
            "KVortex: %.1f GiB of host RAM hold %d blocks, %d tokens, against %d tokens on %s",
            size / GIB,
            num_slots,
            num_slots * geometry.block_tokens,
            geometry.num_gpu_blocks * geometry.block_tokens,
            layout.device,
        )

    def take_failed_requests(self) -> set[str]:
        """Those to tell vLLM of; where it is told of blocks, it keeps what else they loaded."""
        failed = self.worker.take_failed_requests()
        return set() if self._names_blocks else failed

    def take_bad_blocks(self) -> set[int]:
        """Those to tell vLLM of."""
        bad = self.worker.take_bad_blocks()
        return bad if self._names_blocks else set()

    def sleep(self) -> None:
        """Let copies end and leave the GPU; the host's blocks stay. May be called twice."""
        if not self._asleep:
            self._asleep = True
            self.worker.close()

    def wake_up(self) -> None:
        """The KV tensors are where they were, without their bytes. May be called twice."""
        if self._asleep:
            engine = open_copy_engine(self._layout, self._pool, self._num_streams, warm_up=False)
            self.worker.reopen(engine)
            self._asleep = False

    def close(self) -> None:
        """Let copies end and give the memory back."""
        self.worker.close()
        self._pool.close()


def _memory_of_all_ranks() -> tuple[int, int]:
    """Free RAM in bytes before any rank of this machine took its share, and how many they are.

    Every rank has to look before one of them allocates, or their sum could be more than there is.
    """
    world = get_world_group()
    mine = (socket.gethostname(), free_memory_bytes())
    all_ranks = [mine] * world.world_size
    torch.distributed.all_gather_object(all_ranks, mine, group=world.cpu_group)
    free = [number for host, number in all_ranks if host == mine[0]]
    return min(free), len(free)
