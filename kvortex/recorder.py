"""Recorder: writes what requests asked for to a trace, on a thread of its own. Scheduler side."""

from __future__ import annotations

import gzip
import json
import logging
import secrets
import time
from hashlib import blake2b
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Self

from kvortex.core import ConfigError
from kvortex.trace import FORMAT, ID_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from kvortex.core import BlockKey

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 30
"""Of the compressed file."""
WAITING = 4096
"""Requests that may wait for the writer; more are left out and counted."""
FLUSH_EVERY, FLUSH_S = 256, 1.0
"""After so many requests, or seconds, what was written can be read: vLLM kills its processes."""

Row = tuple[str, tuple["BlockKey", ...], dict[str, int], int, float]


class Recorder:
    """One compressed file of JSON lines, which `kvortex simulate` reads.

    It holds no prompt and no key: both keys and request ids are hashed with a salt that is drawn
    for the file and kept nowhere. When the file has `most_bytes`, or its disk is full, recording
    ends and everything else goes on. `record` is called by one thread.

    Args:
        path: the file, which is replaced.
        block_tokens: tokens of a block.
        block_bytes: bytes of a block in host memory, all ranks together.
        most_bytes: of the file.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(
        self, path: Path, block_tokens: int, block_bytes: int, most_bytes: int = MOST_BYTES
    ) -> None:
        self.left_out = 0
        """Requests that came faster than they could be written, or after the end."""
        self._salt = secrets.token_bytes(16)
        self._most_bytes = most_bytes
        self._rows: SimpleQueue[Row | None] = SimpleQueue()
        try:
            self._raw = path.open("wb")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written as a trace: {error}") from None
        self._file = gzip.GzipFile(fileobj=self._raw, mode="wb", compresslevel=5)
        header = {"format": FORMAT, "block_tokens": block_tokens, "block_bytes": block_bytes}
        self._ended = False
        self._thread = Thread(target=self._write, args=(header,), name="kvortex-trace", daemon=True)
        self._thread.start()

    def record(
        self,
        request_id: str,
        keys: Sequence[BlockKey],
        hits: Mapping[str, int],
        num_tokens: int,
        time_s: float,
    ) -> None:
        """Note one request; returns at once.

        Args:
            request_id: vLLM's.
            keys: of the prompt's whole blocks, the first first.
            hits: name of a tier ("gpu", "host", "disk") to blocks that it served.
            num_tokens: of the prompt.
            time_s: seconds on any clock that only goes forward.
        """
        if self._ended or self._rows.qsize() >= WAITING:
            self.left_out += 1
        else:
            self._rows.put((request_id, tuple(keys), dict(hits), num_tokens, time_s))

    def close(self) -> None:
        """Write what waits, then end the file. May be called twice."""
        self._rows.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, header: dict[str, object]) -> None:
        try:
            with self._raw, self._file:
                self._put(header)
                self._file.flush()
                self._write_rows()
        except OSError as error:
            logger.warning("The trace ends here: %s.", error)
        finally:
            self._ended = True

    def _write_rows(self) -> None:
        """Until the end is asked for, or the file has its size."""
        unflushed, flushed_at = 0, time.monotonic()
        while True:
            try:
                row = self._rows.get(timeout=FLUSH_S if unflushed else None)
                if row is None:
                    return
                self._put(self._line(*row))
                unflushed += 1
            except Empty:
                pass
            if unflushed < FLUSH_EVERY and time.monotonic() - flushed_at < FLUSH_S:
                continue
            self._file.flush()
            unflushed, flushed_at = 0, time.monotonic()
            if self._raw.tell() >= self._most_bytes:
                logger.warning("The trace ends here: it has %d bytes.", self._most_bytes)
                return

    def _line(
        self,
        request_id: str,
        keys: tuple[BlockKey, ...],
        hits: dict[str, int],
        num_tokens: int,
        time_s: float,
    ) -> dict[str, object]:
        return {
            "timestamp": int(time_s * 1000),
            "input_length": num_tokens,
            "hash_ids": [self._hash(key) for key in keys],
            "request": self._hash(request_id.encode()),
            "hits": hits,
        }

    def _put(self, line: dict[str, object]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def _hash(self, told: bytes) -> int:
        digest = blake2b(told, digest_size=ID_BYTES - 1, key=self._salt).digest()
        return int.from_bytes(digest, "big")
