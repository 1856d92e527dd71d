"""BlockShape: how vLLM groups a model's layers, and what one KV block takes on a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvortex.prefix_match import Reach

if TYPE_CHECKING:
    from kvortex.planning.attention import Attention

CLOSE = 1.5
"""Where one kind has less than so many times the layers of another, vLLM pads instead of splitting
(`_get_kv_cache_groups_uniform_page_size` in its v1/core/kv_cache_utils.py)."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Blocks of `block_tokens` tokens; one of any group takes `block_bytes` on each of the GPUs."""

    block_tokens: int
    block_bytes: int
    reaches: tuple[Reach, ...]
    """Of each group."""
    num_gpus: int

    @property
    def bytes_per_token(self) -> int:
        """What a token takes in all groups on one GPU, as long as all of them keep it."""
        return self.block_bytes * len(self.reaches) // self.block_tokens

    def tokens(self, blocks: int) -> int:
        """How many tokens so many blocks hold for all groups."""
        return blocks // len(self.reaches) * self.block_tokens

    def loaded_bytes(self, tokens: int) -> int:
        """What one GPU has to load to go on behind so many tokens: of a window, its reach."""
        blocks = tokens // self.block_tokens
        first = (reach.first_token(tokens) // self.block_tokens for reach in self.reaches)
        return sum(blocks - start for start in first) * self.block_bytes


def block_shape(attention: Attention, block_tokens: int, tensor_parallel: int) -> BlockShape:
    """How vLLM would lay out the KV cache.

    Groups have equally many layers, some of them padding, so that a block of any is as large.

    Raises:
        ConfigError: the heads cannot be spread over so many GPUs.
    """
    page = attention.bytes_per_token(tensor_parallel) * block_tokens
    kinds = Counter(attention.windows)
    fewest, most = min(kinds.values()), max(kinds.values())
    size = most if most < fewest * CLOSE else fewest
    groups = [
        Reach(window=window) for window, layers in kinds.items() for _ in range(-(-layers // size))
    ]
    return BlockShape(block_tokens, size * page, tuple(groups), tensor_parallel)
