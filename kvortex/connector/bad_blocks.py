"""BadBlocks: GPU blocks that hold wrong bytes until they are computed again. Scheduler side."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NOBODY = ""


class BadBlocks:
    """Of requests that share blocks whose load failed, vLLM has the first compute them again and
    lets the others go on as if they were good. Where the first one is aborted or preempted instead,
    or gets only a part done, the others read them; this knows.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._begun_by: dict[int, str] = {}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._begun_by)

    def add(self, block_ids: Iterable[int]) -> None:
        """Their load failed."""
        self._begun_by |= dict.fromkeys(block_ids, NOBODY)

    def discard(self, block_ids: Iterable[int]) -> None:
        """They are given other contents."""
        for block_id in block_ids:
            self._begun_by.pop(block_id, None)

    def compute(self, request_id: str, block_ids: Sequence[int], first: int, last: int) -> None:
        """A request, whose blocks these are, computes its tokens from `first` up to `last`."""
        size = self._block_tokens
        for number in range(first // size, min(-(-last // size), len(block_ids))):
            block_id = block_ids[number]
            begun_by = self._begun_by.get(block_id)
            if begun_by is None or (number * size < first and begun_by != request_id):
                continue
            if last < (number + 1) * size:
                self._begun_by[block_id] = request_id
            else:
                del self._begun_by[block_id]

    def read(self, request_id: str, block_ids: Sequence[int], first: int) -> set[int]:
        """The bad ones of those that hold a request's tokens before `first`."""
        held = block_ids[: -(-first // self._block_tokens)]
        return {i for i in held if self._begun_by.get(i, request_id) != request_id}
