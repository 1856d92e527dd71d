"""longest_prefix: how much of a prompt can be restored for all KV cache groups. Scheduler side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from kvortex.core import BlockKey


@dataclass(frozen=True, slots=True)
class Reach:
    """How far back the layers of a KV cache group look, in tokens; by default to the beginning.

    `window` is that of sliding-window attention, the token itself included; `chunk` that of chunked
    local attention, which looks back to the last multiple of it.
    """

    window: int | None = None
    chunk: int | None = None

    @property
    def whole(self) -> bool:
        """Whether every block before is needed, back to the first."""
        return self.window is None and self.chunk is None

    def first_token(self, num_tokens: int) -> int:
        """The first of `num_tokens` tokens that whatever comes next looks at."""
        if self.window is not None:
            return max(0, num_tokens - self.window + 1)
        if self.chunk is not None:
            return num_tokens // self.chunk * self.chunk
        return 0


def longest_prefix(
    readable: Container[BlockKey],
    keys: Sequence[Sequence[BlockKey]],
    reaches: Sequence[Reach],
    first: int,
    block_tokens: int,
    known: int = 0,
) -> int:
    """Number of blocks, at least `first`, up to which a prompt can be restored.

    Args:
        readable: the keys whose bytes can be loaded.
        keys: for each group, those of the blocks from number `first` on; equally many.
        reaches: of each group.
        first: blocks that are on the GPU already.
        block_tokens: tokens of a block.
        known: blocks up to which it can be restored anyway, as from fewer keys.
    """
    known = max(first, known)
    end = first + len(keys[0])
    for of_group, reach in zip(keys, reaches, strict=True):
        if reach.whole:
            end = min(end, known + _leading(readable, of_group[known - first :]))
    windows = [pair for pair in zip(keys, reaches, strict=True) if not pair[1].whole]
    while end > known:
        for of_group, reach in windows:
            missing = _last_missing(readable, of_group, reach, first, end, block_tokens)
            if missing is not None:
                end = missing  # whatever ends behind it and before `end` needs it, too
                break
        else:
            break
    return end


def _leading(readable: Container[BlockKey], keys: Sequence[BlockKey]) -> int:
    for count, key in enumerate(keys):
        if key not in readable:
            return count
    return len(keys)


def _last_missing(
    readable: Container[BlockKey],
    keys: Sequence[BlockKey],
    reach: Reach,
    first: int,
    end: int,
    block_tokens: int,
) -> int | None:
    """The last block within reach of block `end` that cannot be loaded."""
    start = max(first, reach.first_token(end * block_tokens) // block_tokens)
    for number in range(end - 1, start - 1, -1):
        if keys[number - first] not in readable:
            return number
    return None
