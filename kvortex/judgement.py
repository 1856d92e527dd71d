"""Judgement: which blocks of a load are not what was stored, once they arrived. Worker side."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Judgement:
    """On the blocks that one ticket brings, and on those that its copy brought before.

    Args:
        find: returns the ids of those blocks of the ticket that are wrong. Called once, and not
            before they arrived.
        earlier: on the ticket before it, of the same copy and stream, which is reached first.
    """

    __slots__ = ("_earlier", "_find", "bad_block_ids")

    def __init__(self, find: Callable[[], list[int]], earlier: Judgement | None = None) -> None:
        self.bad_block_ids: list[int] = []
        self._find: Callable[[], list[int]] | None = find
        self._earlier = earlier

    def settle(self) -> None:
        """The blocks arrived: fill `bad_block_ids`, unless that was done.

        The rows in which kernels left what they found may be another copy's from now on.
        """
        if self._find is None:
            return
        bad = self._find()
        if self._earlier is not None:
            self._earlier.settle()
            bad = self._earlier.bad_block_ids + bad
        self.bad_block_ids = bad
        self._find = self._earlier = None
