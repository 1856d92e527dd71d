"""KVortexEngine: both sides in one process, over any dict of KV tensors, without vLLM."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

import numpy as np

from kvortex.config import slots_in_pool
from kvortex.core import (
    MAX_KEY_BYTES,
    BlockNotFoundError,
    ClosedError,
    ConfigError,
    InvalidBlockError,
    TransferError,
)
from kvortex.free_memory import require_free_memory
from kvortex.host_pool import open_pool
from kvortex.layout import make_layout
from kvortex.plugins import load_policy
from kvortex.scheduler import OffloadScheduler
from kvortex.tiers import HostTier
from kvortex.verification import verification_of
from kvortex.worker import open_worker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    import torch

    from kvortex.config import KVortexConfig
    from kvortex.core import BlockIds, BlockKey, Job


class Transfer:
    """A save or a load under way. `blocks` is how many blocks of the request it carries."""

    def __init__(self, engine: KVortexEngine, job: Job | None, verb: str) -> None:
        self.blocks = len(job.block_ids) if job is not None else 0
        self._engine = engine
        self._job_id = job.id if job is not None else None
        self._verb = verb

    @property
    def done(self) -> bool:
        """Whether it ended, well or not; saved blocks are readable from then on. Never blocks."""
        return self._job_id is None or self._engine._is_settled(self._job_id)

    def wait(self, timeout: float | None = None) -> int:
        """Block until it ended and return `blocks`.

        Args:
            timeout: seconds; None waits without limit.

        Raises:
            TimeoutError: it has not ended yet; it may be waited for again.
            TransferError: the copy failed, or a load failed meanwhile: then no save under way
                can be trusted to have read what it should.
            ClosedError: the engine was shut down before it ended.
        """
        if self._job_id is not None and not self._engine._settle_within(self._job_id, timeout):
            raise TimeoutError(f"the {self._verb} of {self.blocks} blocks takes over {timeout} s")
        if self._job_id in self._engine._failed_jobs:
            raise TransferError(f"the {self._verb} of {self.blocks} blocks failed")
        return self.blocks


class KVortexEngine:
    """Saves KV blocks to host RAM under keys, and loads them back.

    Construction returns when the whole pool is ready, so that no save evicts while slots are still
    to come. For use from one thread. A key names its bytes: saving it again replaces them.

    Args:
        config: pool size, streams and policy.
        kv_caches: layer name to tensor; dimension 0 is the block, strides are free; on one GPU or
            in host memory.

    Raises:
        ConfigError, LayoutError, PoolAllocationError: the engine cannot start so.
        TransferError: this GPU cannot run the kernel.
    """

    def __init__(self, config: KVortexConfig, kv_caches: Mapping[str, torch.Tensor]) -> None:
        if config.disk_path is not None:  # its keys name their bytes only until the next save
            raise ConfigError(
                f"disk_path={config.disk_path!r}: only the vLLM connector has a disk tier; leave "
                "it and disk_pool_gb out for KVortexEngine"
            )
        self._layout = make_layout(kv_caches)
        num_slots = slots_in_pool(config, self._layout.slot_bytes)
        policy = load_policy(config.eviction_policy, num_slots)
        require_free_memory(config.ram_pool_gb, num_slots * self._layout.slot_bytes)
        self._pool = open_pool(config, self._layout, num_slots)
        self._pool.wait_until_ready()
        self._worker = open_worker(
            self._layout,
            self._pool,
            config.num_cuda_streams,
            verification_of(self._layout, config.verify),
        )
        self._scheduler = OffloadScheduler(
            HostTier(num_slots, policy), slot_bytes=self._layout.slot_bytes
        )
        self._unsettled: set[int] = set()
        self._failed_jobs: set[int] = set()
        self._closed = False

    def save_blocks(self, keys: Sequence[BlockKey], block_ids: Sequence[int]) -> Transfer:
        """Start copying blocks to the host; the source must stay as it is until it is done.

        A full pool evicts. Where all that is left is in use by transfers, a leading part of the
        list is saved; `Transfer.blocks` says how many.

        Raises:
            InvalidBlockError: a bad or repeated key, an id out of range, unequal lengths.
        """
        keys = list(keys)
        ids = self._checked(keys, block_ids)
        if len(set(keys)) != len(keys):
            raise InvalidBlockError("a key appears twice in one save: which bytes would it name?")
        job = self._scheduler.store(keys, ids.tolist())
        return self._start(job, "save")

    def load_blocks(self, keys: Sequence[BlockKey], block_ids: Sequence[int]) -> Transfer:
        """Start copying saved bytes into blocks, after the current stream's work so far.

        Raises:
            BlockNotFoundError: a key is not readable; nothing was copied.
            InvalidBlockError: a bad key, an id out of range or twice, unequal lengths.
        """
        keys = list(keys)
        ids = self._checked(keys, block_ids)
        if len(np.unique(ids)) != len(ids):
            raise InvalidBlockError("a block id appears twice in one load: which key wins?")
        for key, there in zip(keys, self.check_blocks(keys), strict=True):
            if not there:
                raise BlockNotFoundError(f"key {key.hex()} is not saved; nothing was loaded")
        self._scheduler.tier.touch(keys)
        return self._start(self._scheduler.load(keys, ids.tolist()), "load")

    def check_blocks(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Whether each key can be loaded now."""
        self._poll()
        return [self._scheduler.tier.lookup(_checked_key(key)) is not None for key in keys]

    def stats(self) -> dict[str, int | float]:
        """Slots by state, and blocks by what became of them since start (`metrics.Counters`)."""
        self._poll()
        tier = self._scheduler.tier
        return {
            "total_slots": tier.index.num_slots,
            "free_slots": tier.index.free,
            "reserved_slots": tier.index.reserved,
            "resident_slots": tier.index.resident,
            "quarantined_slots": tier.index.quarantined,
            "slot_bytes": self._layout.slot_bytes,
            **self._scheduler.counters.as_dict(),
        }

    def shutdown(self) -> None:
        """Let transfers end, then give memory and streams back. May be called twice."""
        if self._closed:
            return
        self._worker.close()
        self._poll()
        self._pool.close()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _start(self, job: Job | None, verb: str) -> Transfer:
        transfer = Transfer(self, job, verb)
        if job is not None:
            self._unsettled.add(job.id)
        self._worker.begin(self._scheduler.take_plan(has_forward=False))
        self._poll()
        return transfer

    def _poll(self) -> None:
        if self._closed:
            raise ClosedError("this engine was shut down")
        report = self._worker.report()
        self._worker.take_bad_blocks()  # vLLM's channel; here the transfer itself raises
        for flight in self._scheduler.settle(report):
            self._unsettled.discard(flight.job.id)
            if flight.failed or flight.discard:
                self._failed_jobs.add(flight.job.id)

    def _is_settled(self, job_id: int) -> bool:
        if job_id in self._unsettled:
            self._poll()
        return job_id not in self._unsettled

    def _settle_within(self, job_id: int, timeout: float | None) -> bool:
        """Wait for the copy behind a job, then take in its end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._is_settled(job_id):
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            try:
                self._worker.tickets()[job_id].wait(left)
            except TransferError:
                continue  # the next poll reports it
        return True

    def _checked(self, keys: Sequence[BlockKey], block_ids: Sequence[int]) -> BlockIds:
        self._poll()
        try:
            ids = np.asarray(block_ids)
        except ValueError as error:  # ragged
            raise InvalidBlockError(f"block ids must be a flat list of integers: {error}") from None
        if ids.ndim != 1 or len(keys) != len(ids):
            raise InvalidBlockError(f"{len(keys)} keys for block ids of shape {ids.shape}")
        if len(ids) and ids.dtype.kind not in "iu":
            raise InvalidBlockError(f"block ids of type {ids.dtype}: ids are integers")
        for key in keys:
            _checked_key(key)
        last = self._layout.num_blocks - 1
        wrong = ids[(ids < 0) | (ids > last)]
        if len(wrong):
            raise InvalidBlockError(f"block id {wrong[0]} is out of range: the ids are 0 to {last}")
        return ids.astype(np.int64)


def _checked_key(key: BlockKey) -> BlockKey:
    if not isinstance(key, bytes) or not 1 <= len(key) <= MAX_KEY_BYTES:
        raise InvalidBlockError(f"key {key!r}: a key is 1 to {MAX_KEY_BYTES} bytes")
    return key
