"""Adapters: marks the keys of requests that use a LoRA adapter. On the scheduler's thread."""

from __future__ import annotations

import json
import logging
import secrets
from hashlib import blake2b
from typing import TYPE_CHECKING

from kvortex.connector.weight_files import weight_files

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

MARK_BYTES = 7
"""No multiple of 4, as the lengths of all hashes are: so the length of a key tells of a mark."""


class Adapters:
    """vLLM's hashes tell adapters apart by name and path. Under those the weights may be others
    after a restart, when blocks on disk are still those of the former ones: so keys have a mark
    of the weights as well.

    An adapter is looked at when the first request uses it, and when one has it loaded anew, as that
    is when vLLM reads it.
    """

    def __init__(self) -> None:
        self._marks: dict[tuple[int, str], bytes] = {}

    def mark(self, lora: LoRARequest | None) -> bytes:
        """MARK_BYTES bytes; none for the model itself.

        An adapter whose files cannot be read has a mark that nobody finds again after a restart.
        """
        if lora is None:
            return b""
        known = (lora.lora_int_id, lora.lora_path)
        if known not in self._marks or getattr(lora, "load_inplace", False):
            self._marks[known] = _mark_of(lora.lora_path)
        return self._marks[known]


def unmarked(block_hash: bytes) -> bytes:
    """vLLM's own hash, of one that may have a mark behind it."""
    return block_hash[:-MARK_BYTES] if len(block_hash) % 4 else block_hash


def _mark_of(path: str) -> bytes:
    try:
        files = weight_files(path, None, "adapter_config.json")
    except OSError:
        files = []
    if not files:
        logger.warning(
            "disk_path: the files of the LoRA adapter %r are not to be seen here, so its blocks on "
            "disk will not be found after a restart.",
            path,
        )
        return secrets.token_bytes(MARK_BYTES)
    return blake2b(json.dumps(files).encode(), digest_size=MARK_BYTES).digest()
