"""WorkerSide: opens the pool and the copy engine once vLLM's KV tensors exist. One per rank."""

from __future__ import annotations

import contextlib
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.distributed.parallel_state import get_world_group

from kvortex.config import GIB, slots_in_pool
from kvortex.connector.disk_namespace import namespace_of
from kvortex.disk import DiskOptions, DiskStore, disk_slots_in_pool
from kvortex.disk_worker import DiskWorker
from kvortex.free_memory import free_memory_bytes, require_free_memory
from kvortex.host_pool import open_pool
from kvortex.layout import make_layout
from kvortex.verification import verification_of
from kvortex.worker import open_copy_engine, open_worker

if TYPE_CHECKING:
    from collections.abc import Set

    from vllm.config import VllmConfig

    from kvortex.config import KVortexConfig
    from kvortex.connector.geometry import Geometry
    from kvortex.disk import Namespace
    from kvortex.layout import Layout
    from kvortex.verification import Verification, Verify

logger = logging.getLogger(__name__)


class WorkerSide:
    """The rank's share of the host pool, and the worker that fills it."""

    def __init__(
        self,
        config: KVortexConfig,
        geometry: Geometry,
        kv_caches: dict[str, torch.Tensor],
        vllm_config: VllmConfig,
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
        namespace = None
        if config.disk_path is not None:
            namespace = namespace_of(vllm_config, geometry, layout)
        self._verification = _verification(config, layout, namespace)
        with contextlib.ExitStack() as opened:
            self._pool = opened.enter_context(open_pool(config, layout, num_slots))
            self._disk: DiskStore | None = None
            if namespace is not None:
                store = self._open_disk(config, geometry, namespace, vllm_config)
                self._disk = opened.enter_context(store)
            disk = DiskWorker(self._disk) if self._disk is not None else None
            self.worker = open_worker(
                layout, self._pool, self._num_streams, self._verification, disk
            )
            opened.pop_all()
        logger.info(
            "KVortex: %.3g GiB of host RAM hold %d blocks, %d tokens, against %d tokens on %s",
            size / GIB,
            num_slots,
            num_slots * geometry.block_tokens,
            geometry.num_gpu_blocks * geometry.block_tokens,
            layout.device,
        )
        if self._disk is not None:
            logger.info(
                "KVortex: %.3g GiB of disk at %s hold %d blocks, %d were found there",
                self._disk.num_slots * layout.slot_bytes / GIB,
                _folder(config),
                self._disk.num_slots,
                len(self._disk.survivors.keys),
            )

    def take_failed_requests(self) -> set[str]:
        """Those to tell vLLM of; where it is told of blocks, it keeps what else they loaded."""
        failed = self.worker.take_failed_requests()
        return set() if self._names_blocks else failed

    def take_bad_blocks(self) -> Set[int]:
        """Those to tell vLLM of, which asks in the step that loaded them."""
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
            engine = open_copy_engine(
                self._layout, self._pool, self._num_streams, self._verification, warm_up=False
            )
            self.worker.reopen(engine)
            self._asleep = False

    def _open_disk(
        self,
        config: KVortexConfig,
        geometry: Geometry,
        namespace: Namespace,
        vllm_config: VllmConfig,
    ) -> DiskStore:
        """This rank's share of the disk pool; replicas of the engine have folders of their own."""
        assert config.disk_pool_gb is not None
        parallel = vllm_config.parallel_config
        most = config.disk_write_bytes_per_s
        return DiskStore(
            _folder(config),
            namespace,
            parallel.data_parallel_rank * geometry.num_ranks + get_world_group().rank,
            disk_slots_in_pool(config.disk_pool_gb, geometry.slot_bytes, geometry.num_ranks),
            self._pool,
            DiskOptions(
                max_write_bytes_per_s=None if most is None else most / geometry.num_ranks,
                read_deadline_s=config.disk_read_deadline_ms / 1e3,
            ),
            self._verification,
        )

    def close(self) -> None:
        """Let copies end and give the memory back."""
        self.worker.close()
        if self._disk is not None:
            self._disk.close()
        self._pool.close()


def _folder(config: KVortexConfig) -> Path:
    assert config.disk_path is not None
    return Path(config.disk_path).expanduser().absolute()


def _verification(
    config: KVortexConfig, layout: Layout, namespace: Namespace | None
) -> Verification:
    """Nobody but the kernel that loads it compares what came from disk: so then all loads are."""
    if namespace is None:
        return verification_of(layout, config.verify)
    mode: Verify = "off" if config.verify == "off" else "always"
    return verification_of(layout, mode, namespace.identity)


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
