"""Traces of requests: which blocks each asked for, read from files of JSON lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvortex.core import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from kvortex.core import BlockKey

BLOCK_TOKENS = 512
"""Of a hash id in a trace of Mooncake's format."""
ID_BYTES = 8


@dataclass(frozen=True, slots=True)
class Request:
    """The keys of a prompt's blocks, in order, and its tokens."""

    keys: tuple[BlockKey, ...]
    tokens: int


def read_trace(path: Path) -> list[Request]:
    """Read a trace in Mooncake's format: a JSON object a line, with `hash_ids` and `input_length`.

    Source of the format: https://github.com/kvcache-ai/Mooncake, FAST25-release/traces.

    Raises:
        ConfigError: the file cannot be read, or a line is not such an object.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a trace: {error}") from None
    requests = [_request(path, number, line) for number, line in enumerate(lines, 1) if line]
    if not any(request.keys for request in requests):
        raise ConfigError(f"{path}: no request in it has blocks")
    return requests


def _request(path: Path, number: int, line: str) -> Request:
    try:
        told: dict[str, Any] = json.loads(line)
        keys = tuple(block.to_bytes(ID_BYTES, "big") for block in told["hash_ids"])
        tokens = int(told.get("input_length", len(keys) * BLOCK_TOKENS))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"{path}:{number}: not a request ({error!r}); a line is an object with hash_ids, a "
            "list of numbers from 0 on, and input_length"
        ) from None
    return Request(keys, tokens)
