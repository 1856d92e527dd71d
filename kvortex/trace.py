"""Traces of requests: which blocks each asked for, read from files of JSON lines."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvortex.core import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvortex.core import BlockKey

FORMAT = "kvortex-trace-1"
"""In the first line of a trace that KVortex recorded."""
BLOCK_TOKENS = 512
"""Of a hash id in a trace of Mooncake's format."""
ID_BYTES = 8
GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Request:
    """The keys of a prompt's blocks, in order, and its tokens."""

    keys: tuple[BlockKey, ...]
    tokens: int
    time_ms: int = 0
    hits: dict[str, int] = field(default_factory=dict)
    """Tier to the blocks that it served when the trace was recorded."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order, and what a block is."""

    requests: list[Request]
    block_tokens: int = BLOCK_TOKENS
    block_bytes: int | None = None
    """Of a block in host memory, where it is known."""

    def distinct_blocks(self) -> int:
        """How many blocks a pool would need to keep them all."""
        return len({key for request in self.requests for key in request.keys})

    def facts(self) -> dict[str, Any]:
        """What is in it, as numbers by name."""
        hits = Counter[str]()
        for request in self.requests:
            hits.update(request.hits)
        times = [request.time_ms for request in self.requests]
        return {
            "requests": len(self.requests),
            "seconds": (max(times) - min(times)) / 1000,
            "tokens": sum(request.tokens for request in self.requests),
            "blocks": sum(len(request.keys) for request in self.requests),
            "distinct_blocks": self.distinct_blocks(),
            "block_tokens": self.block_tokens,
            "block_bytes": self.block_bytes,
            **{f"hits_{tier}": count for tier, count in sorted(hits.items())},
        }


def read_trace(path: Path) -> Trace:
    """Read a trace of Mooncake's format or one that KVortex recorded, compressed by gzip or not.

    Each line is a JSON object with `hash_ids` and `input_length`. Of a compressed file that was cut
    off, as by a process that was killed, what can be read is read.

    Source of the format: https://github.com/kvcache-ai/Mooncake, FAST25-release/traces.

    Raises:
        ConfigError: the file cannot be read, or a line is not such an object.
    """
    requests: list[Request] = []
    header: dict[str, Any] = {}
    for number, line in _lines(path):
        told = _object(path, number, line)
        if number == 1 and "format" in told:
            header = told
        else:
            requests.append(_request(path, number, told))
    if not any(request.keys for request in requests):
        raise ConfigError(f"{path}: no request in it has blocks")
    if header and header["format"] != FORMAT:
        raise ConfigError(f"{path}: format {header['format']!r}; this KVortex reads {FORMAT!r}")
    return Trace(requests, header.get("block_tokens", BLOCK_TOKENS), header.get("block_bytes"))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not empty."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == GZIP
        with gzip.open(path, "rb") if packed else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if packed and not line.endswith(b"\n"):
                    return
                if text := line.decode().strip():
                    yield number, text
    except EOFError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a trace: {error}") from None


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        told = json.loads(line)
    except ValueError as error:
        raise _refusal(path, number, error) from None
    if not isinstance(told, dict):
        raise _refusal(path, number, TypeError(type(told).__name__))
    return told


def _request(path: Path, number: int, told: dict[str, Any]) -> Request:
    try:
        keys = tuple(block.to_bytes(ID_BYTES, "big") for block in told["hash_ids"])
        tokens = int(told.get("input_length", len(keys) * BLOCK_TOKENS))
        return Request(keys, tokens, int(told.get("timestamp", 0)), dict(told.get("hits", {})))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _refusal(path, number, error) from None


def _refusal(path: Path, number: int, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path}:{number}: not a request ({error!r}); a line is an object with hash_ids, a "
        "list of numbers from 0 on, and input_length"
    )
