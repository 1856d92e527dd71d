"""The nouns that every part of KVortex shares, and its errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    BlockIds = npt.NDArray[np.int64]

BlockKey = bytes
"""What a block's bytes are known by: 1 to 64 bytes, in vLLM its block hash and KV cache group."""

MAX_KEY_BYTES = 64


class KVortexError(Exception):
    """Parent of every error that KVortex raises on purpose."""


class ConfigError(KVortexError, ValueError):
    """A setting that cannot be used; the message names it, its value and what would do."""


class LayoutError(KVortexError, ValueError):
    """A KV tensor whose geometry cannot be copied; the message shows its shape and strides."""


class PoolAllocationError(KVortexError, MemoryError):
    """Host memory for the pool could not be had."""


class BlockNotFoundError(KVortexError, KeyError):
    """A key that was asked for is not readable in any tier."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InvalidBlockError(KVortexError, ValueError):
    """Keys or block ids that do not fit the request: out of range, twice, or of unequal number."""


class TransferError(KVortexError, RuntimeError):
    """A copy between GPU and host failed; its blocks hold nothing that may be used."""


class ClosedError(KVortexError, RuntimeError):
    """The engine was shut down before this call."""


class Direction(Enum):
    """Which way a block moves: STORE is GPU to host, LOAD is host to GPU."""

    STORE = "store"
    LOAD = "load"

    __hash__ = object.__hash__  # Enum's own is slow, and this is looked up for every copy


@dataclass(frozen=True, slots=True)
class Job:
    """One transfer for a worker: `block_ids[i]` on the GPU and host slot `slots[i]`.

    Both are int64 arrays of equal length; `id` is unique for the life of a scheduler.
    """

    id: int
    block_ids: BlockIds
    slots: BlockIds


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a worker shall do in one step, from the scheduler side."""

    loads: tuple[Job, ...] = ()
    stores: tuple[Job, ...] = ()
    has_forward: bool = True
    """Whether the model runs in this step; stores then wait for what it computes."""
    lost_block_ids: tuple[int, ...] = ()
    """GPU blocks that were promised a load whose source is gone; they must be recomputed."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What workers finished since their last report.

    `finished` counts, per job, the ranks that are done with it; `failed` names the jobs that
    failed on at least one of them. `num_slots` is the smallest number of slots in their pools;
    a worker tells it once, in its first report.
    """

    finished: dict[int, int] = field(default_factory=dict)
    failed: frozenset[int] = frozenset()
    num_slots: int | None = None

    def merge(self, other: StepReport) -> StepReport:
        """The report of both ranks together."""
        finished = dict(self.finished)
        for job_id, ranks in other.finished.items():
            finished[job_id] = finished.get(job_id, 0) + ranks
        told = [n for n in (self.num_slots, other.num_slots) if n is not None]
        return StepReport(finished, self.failed | other.failed, min(told, default=None))

    def __bool__(self) -> bool:
        """Whether it tells anything."""
        return bool(self.finished) or self.num_slots is not None
