"""MovesUnderWay: what workers move between host and disk and have not ended yet.

Runs in vLLM's scheduler process, on its thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from kvortex.core import DiskMove

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvortex.block import Block
    from kvortex.core import DiskReport


@dataclass(slots=True, eq=False)
class MoveUnderWay:
    """A move, the blocks that it holds in both tiers, and what is known of it so far."""

    move: DiskMove
    in_host: list[Block]
    on_disk: list[Block]
    ranks_left: int
    began: float
    failed: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    """Of the failed positions, those that the drive is to blame for; the others came too late, or
    were not tried."""


AnyMove = TypeVar("AnyMove", bound=MoveUnderWay)


class MovesUnderWay(Generic[AnyMove]):
    """Those of one direction.

    Args:
        kind: makes one.
        ids: unique among the moves of both directions.
        num_ranks: each of which has to end a move.
    """

    def __init__(self, kind: type[AnyMove], ids: Iterator[int], num_ranks: int) -> None:
        self._kind = kind
        self._ids = ids
        self._num_ranks = num_ranks
        self._moves: dict[int, AnyMove] = {}
        self._new: list[DiskMove] = []

    def __len__(self) -> int:
        return len(self._moves)

    def __iter__(self) -> Iterator[AnyMove]:
        """From the oldest on."""
        return iter(self._moves.values())

    def begin(self, in_host: list[Block], on_disk: list[Block]) -> AnyMove:
        """Plan to move `in_host[i]` to `on_disk[i]`, or the other way."""
        move = DiskMove(
            next(self._ids),
            tuple(block.key for block in in_host),
            np.fromiter((block.slot for block in in_host), np.int64, len(in_host)),
            np.fromiter((block.slot for block in on_disk), np.int64, len(on_disk)),
        )
        begun = self._kind(move, in_host, on_disk, self._num_ranks, time.perf_counter())
        self._moves[move.id] = begun
        self._new.append(move)
        return begun

    def take_new(self) -> tuple[DiskMove, ...]:
        """What was planned since the last call."""
        new, self._new = tuple(self._new), []
        return new

    def settle(self, report: DiskReport) -> list[AnyMove]:
        """Take in what workers tell; returns the moves that every rank has ended."""
        for move_id in report.failed.keys() & self._moves.keys():
            self._moves[move_id].failed |= report.failed[move_id]
        for move_id in report.lost.keys() & self._moves.keys():
            self._moves[move_id].lost |= report.lost[move_id]
        ended = []
        for move_id, ranks in report.finished.items():
            if (move := self._moves.get(move_id)) is None:
                continue
            move.ranks_left -= ranks
            if move.ranks_left <= 0:
                ended.append(self._moves.pop(move_id))
        return ended


def parted(blocks: Sequence[Block], bad: set[int]) -> tuple[list[Block], list[Block]]:
    """Those whose bytes arrived and are still wanted, and the others."""
    return (
        [block for position, block in enumerate(blocks) if position not in bad],
        [block for position, block in enumerate(blocks) if position in bad],
    )
