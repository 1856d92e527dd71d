"""The nouns that every part of KVortex shares, and its errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    BlockIds = npt.NDArray[np.int64]

BlockKey = bytes
"""What a block's bytes are known by: 1 to 64 bytes, in vLLM its block hash and KV cache group."""

MAX_KEY_BYTES = 64
LONGEST_SHOWN = 80
"""Characters of a value in a message."""


class KVortexError(Exception):
    """Parent of every error that KVortex raises on purpose; its message is one line."""

    def __str__(self) -> str:
        return printable(str(self.args[0])) if self.args else ""


class ConfigError(KVortexError, ValueError):
    """A setting that cannot be used; the message names it, its value and what would do."""


class LayoutError(KVortexError, ValueError):
    """A KV tensor whose geometry cannot be copied; the message shows its shape and strides."""


class PoolAllocationError(KVortexError, MemoryError):
    """Host memory for the pool could not be had."""


class BlockNotFoundError(KVortexError, KeyError):
    """A key that was asked for is not readable in any tier."""


class InvalidBlockError(KVortexError, ValueError):
    """Keys or block ids that do not fit the request: out of range, twice, or of unequal number."""


class TransferError(KVortexError, RuntimeError):
    """A copy between GPU and host failed; its blocks hold nothing that may be used."""


class ClosedError(KVortexError, RuntimeError):
    """The engine was shut down before this call."""


def printable(text: str) -> str:
    """As it is, but for characters that break a line, steer a terminal or cannot be encoded."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shown(value: object) -> str:
    """A value as a message shows it: its repr, unless that is too long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of many digits, or what is nested deeply
        return f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def shown_bytes(size: float) -> str:
    """A number of bytes as a person reads it: 128 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


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
    request_id: str | None = None
    """Of a load for which no forward waits: its request runs once every rank has told its end."""
    seeds: BlockIds | None = None
    """int64, what the checksum of each block starts from; None is zeros."""


@dataclass(frozen=True, slots=True)
class DiskMove:
    """Blocks that move between host slots and disk slots: `keys[i]`, `slots[i]`, `disk_slots[i]`.

    Both are int64 arrays; `id` is unique among the disk moves of a scheduler.
    """

    id: int
    keys: tuple[BlockKey, ...]
    slots: BlockIds
    disk_slots: BlockIds


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What a worker's disk shall do next; what `clear` forgets is not what comes with it, and what
    the slots in `erases` hold is not what is written to them by the same plan."""

    writes: tuple[DiskMove, ...] = ()
    reads: tuple[DiskMove, ...] = ()
    clear: bool = False
    erases: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DiskReport:
    """What the workers' disks did since their last report.

    `finished` counts, per move, the ranks that are done with it, and `failed` has the positions
    that failed on any of them, of which the drive is to blame for those that are `lost`: such reads
    will not succeed later either.
    `survivors` are the keys found at start, with their slots, and `num_slots` how many slots the
    smallest disk has; both are told once. `counted` has what was added to the workers' counters, by
    name; `reading_off` and `writing_off` tell how many more, or fewer, ranks there are that do not
    read or write for now, as their drive fails.
    """

    finished: dict[int, int] = field(default_factory=dict)
    failed: dict[int, frozenset[int]] = field(default_factory=dict)
    lost: dict[int, frozenset[int]] = field(default_factory=dict)
    survivors: dict[BlockKey, int] | None = None
    num_slots: int | None = None
    counted: dict[str, int] = field(default_factory=dict)
    reading_off: int = 0
    writing_off: int = 0

    def merge(self, other: DiskReport) -> DiskReport:
        """The report of both ranks together; what survived did so on both."""
        survivors = self.survivors if other.survivors is None else other.survivors
        if self.survivors is not None and other.survivors is not None:
            survivors = dict(self.survivors.items() & other.survivors.items())
        return DiskReport(
            _added(self.finished, other.finished),
            _united(self.failed, other.failed),
            _united(self.lost, other.lost),
            survivors,
            _least(self.num_slots, other.num_slots),
            _added(self.counted, other.counted),
            self.reading_off + other.reading_off,
            self.writing_off + other.writing_off,
        )


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a worker shall do in one step, from the scheduler side."""

    loads: tuple[Job, ...] = ()
    stores: tuple[Job, ...] = ()
    has_forward: bool = True
    """Whether the model runs in this step; stores then wait for what it computes."""
    by_layer: bool = False
    """Whether this step computes enough to hide its loads behind: then each layer waits for its
    own part of them only."""
    step: int | None = None
    """Number of this step, if the scheduler wants to hear of its end."""
    lost_block_ids: tuple[int, ...] = ()
    """GPU blocks that were promised a load whose source is gone; they must be recomputed."""
    disk: DiskPlan | None = None
    lost_requests: tuple[str, ...] = ()
    """Who waits apart for a load, of which some blocks are such."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What workers finished since their last report.

    `finished` counts, per job, the ranks that are done with it; `failed` names the jobs that
    failed on at least one of them. `corrupt` has, per load, the positions of blocks that are not
    what was stored, on any of them. `num_slots` is the smallest number of slots in their pools; a
    worker tells it in its first report, and again if it had to become smaller. The speeds, of the
    slowest link, are in every report once they are known: the slowest of those that happen to
    report would not be the slowest.
    """

    finished: dict[int, int] = field(default_factory=dict)
    failed: frozenset[int] = frozenset()
    num_slots: int | None = None
    load_bytes_per_s: float | None = None
    store_bytes_per_s: float | None = None
    layered_loads: int = 0
    """Steps whose loads each layer waited for by itself."""
    step: int | None = None
    """Number of the step that ended with this report."""
    unwaited_layers: int = 0
    """Layers that ran though their load was not known to have ended."""
    ready_slots: int | None = None
    """How many slots every rank has prepared, told in each report until a rank's pool is ready."""
    disk: DiskReport | None = None
    corrupt: dict[int, frozenset[int]] = field(default_factory=dict)
    corrupt_layers: str = ""
    """Where the first block that ever was corrupt on a rank is, in words; told once."""

    def merge(self, other: StepReport) -> StepReport:
        """The report of both ranks together."""
        return StepReport(
            _added(self.finished, other.finished),
            self.failed | other.failed,
            _least(self.num_slots, other.num_slots),
            _least(self.load_bytes_per_s, other.load_bytes_per_s),
            _least(self.store_bytes_per_s, other.store_bytes_per_s),
            max(self.layered_loads, other.layered_loads),
            _least(self.step, other.step),
            self.unwaited_layers + other.unwaited_layers,
            _least(self.ready_slots, other.ready_slots),
            self.disk.merge(other.disk) if self.disk and other.disk else self.disk or other.disk,
            _united(self.corrupt, other.corrupt),
            self.corrupt_layers or other.corrupt_layers,
        )

    def __bool__(self) -> bool:
        """Whether it tells anything."""
        return self != StepReport()


Number = TypeVar("Number", int, float)


def _least(one: Number | None, other: Number | None) -> Number | None:
    return min((n for n in (one, other) if n is not None), default=None)


Name = TypeVar("Name", int, str)


def _added(one: dict[Name, int], other: dict[Name, int]) -> dict[Name, int]:
    both = dict(one)
    for name, number in other.items():
        both[name] = both.get(name, 0) + number
    return both


def _united(
    one: dict[int, frozenset[int]], other: dict[int, frozenset[int]]
) -> dict[int, frozenset[int]]:
    none = frozenset[int]()
    return {key: one.get(key, none) | other.get(key, none) for key in one.keys() | other.keys()}
