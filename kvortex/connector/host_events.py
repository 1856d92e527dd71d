"""HostEvents: what became readable in host memory or no longer is, as vLLM's KV events."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id, maybe_convert_block_hash

from kvortex.connector.adapters import unmarked

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent

    from kvortex.core import BlockKey

MEDIUM = "CPU"
"""As vLLM's own connectors call host memory."""


class HostEvents:
    """Collected as blocks come and go, and taken once a step.

    A router knows blocks by their hashes: like vLLM's own connectors by default, these events carry
    neither tokens nor parents, which the events of the GPU's blocks have told already.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._changes: list[tuple[BlockKey, bool]] = []

    def note(self, key: BlockKey, readable: bool) -> None:
        """A key became readable, or stopped being so."""
        self._changes.append((key, readable))

    def take(self) -> list[KVCacheEvent]:
        """Everything since the last call, in order."""
        changes, self._changes = self._changes, []
        runs = groupby(changes, lambda change: (change[1], get_group_id(change[0])))
        return [
            self._event([key for key, _ in run], readable, group) for (readable, group), run in runs
        ]

    def _event(self, keys: list[BlockKey], readable: bool, group: int) -> KVCacheEvent:
        hashes = [maybe_convert_block_hash(unmarked(get_block_hash(key))) for key in keys]
        if not readable:
            return BlockRemoved(block_hashes=hashes, medium=MEDIUM, group_idx=group)
        return BlockStored(
            block_hashes=hashes,
            parent_block_hash=None,
            token_ids=[],
            block_size=self._block_tokens,
            lora_id=None,
            medium=MEDIUM,
            lora_name=None,
            group_idx=group,
        )
