"""Traces of requests: which blocks each asked for, read from files of JSON lines."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvortex.core import ConfigError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from kvortex.core import BlockKey

FORMAT = "kvortex-trace-1"
"""In the first line of a trace that KVortex recorded."""
BLOCK_TOKENS = 512
"""Of a hash id in a trace of Mooncake's format."""
ID_BYTES = 8
GZIP = b"\x1f\x8b"
LONGEST_LINE = 16 << 20
"""Half a million blocks. A few bytes of a compressed file may be many of a line."""
LARGEST_NUMBER = 1 << 53
"""Of tokens, bytes or milliseconds; more cannot be counted with."""


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
    block_tokens, block_bytes = BLOCK_TOKENS, None
    for number, line in _lines(path):
        told = _object(path, number, line)
        if number == 1 and "format" in told:
            block_tokens, block_bytes = _header(path, told)
        else:
            requests.append(_request(path, number, told))
    if not any(request.keys for request in requests):
        raise ConfigError(f"{path}: no request in it has blocks")
    return Trace(requests, block_tokens, block_bytes)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not empty."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == GZIP
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            lines = iter(lambda: file.readline(LONGEST_LINE), b"")
            for number, line in enumerate(lines, 1):
                if len(line) == LONGEST_LINE:
                    raise ConfigError(f"{path}:{number}: too long for a line of a trace")
                if packed and not line.endswith(b"\n"):
                    return
                if text := line.decode().strip():
                    yield number, text
    except EOFError:
        return
    except (OSError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read as a trace: {error}") from None


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        told = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, number, error) from None
    if not isinstance(told, dict):
        raise _refusal(path, number, TypeError(type(told).__name__))
    return told


def _header(path: Path, told: Mapping[str, Any]) -> tuple[int, int | None]:
    """Tokens of a block, and bytes where they are told."""
    if told["format"] != FORMAT:
        raise ConfigError(f"{path}: format {shown(told['format'])}; this KVortex reads {FORMAT!r}")
    try:
        size = told.get("block_bytes")
        tokens = _number(told.get("block_tokens", BLOCK_TOKENS), least=1)
        return tokens, None if size is None else _number(size, least=1)
    except ValueError as error:
        raise ConfigError(
            f"{path}: the first line does not tell what a block is: {error}"
        ) from None


def _request(path: Path, number: int, told: Mapping[str, Any]) -> Request:
    try:
        keys = tuple(block.to_bytes(ID_BYTES, "big") for block in told["hash_ids"])
        tokens = _number(told.get("input_length", len(keys) * BLOCK_TOKENS))
        hits = {tier: _number(blocks) for tier, blocks in told.get("hits", {}).items()}
        return Request(keys, tokens, _number(told.get("timestamp", 0)), hits)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _refusal(path, number, error) from None


def _number(told: object, least: int = 0) -> int:
    if not isinstance(told, int | float) or not least <= told <= LARGEST_NUMBER:
        raise ValueError(f"{shown(told)} is no number from {least} to {LARGEST_NUMBER}")
    return int(told)


def _refusal(path: Path, number: int, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path}:{number}: not a request ({error!r}); a line is an object with hash_ids, a "
        "list of numbers from 0 on, and input_length"
    )
