"""PrefixTree: which readable blocks continue which. Scheduler side, on its thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvortex.block import Block
    from kvortex.core import BlockKey


class PrefixTree:
    """Links each block to the readable ones before and behind it; a block may come before either.

    The links are in the blocks themselves: `above`, `below` (the newest of its children) and two
    `sibling`s. Adding and removing cost O(1), and O(1) for each child that finds or loses a parent.
    """

    def __init__(self) -> None:
        self._orphans: dict[BlockKey, Block] = {}
        """By the key of a parent that is not readable, the newest of its children."""

    @property
    def has_orphans(self) -> bool:
        """Whether any readable block has a parent that is not."""
        return bool(self._orphans)

    def add(self, block: Block, parent: Block | None) -> None:
        """A block became readable; `parent` is the readable one of `block.parent`, if any."""
        block.below = self._orphans.pop(block.key, None)
        for child in _siblings(block.below):
            child.above = block
        if block.parent is None:
            return
        block.above = parent
        head = self._orphans.get(block.parent) if parent is None else parent.below
        block.right = head
        if head is not None:
            head.left = block
        self._set_head(block, block)

    def remove(self, block: Block) -> None:
        """A block is readable no more; its children have no parent until there is one again."""
        if block.right is not None:
            block.right.left = block.left
        if block.left is not None:
            block.left.right = block.right
        elif block.parent is not None:
            self._set_head(block, block.right)
        for child in _siblings(block.below):
            child.above = None
        if block.below is not None:
            self._orphans[block.key] = block.below
        block.above = block.below = block.left = block.right = None

    def orphans(self, parent: BlockKey) -> Iterator[Block]:
        """The readable children of a key that is not readable."""
        return _siblings(self._orphans.get(parent))

    def _set_head(self, child: Block, head: Block | None) -> None:
        """Name the newest child of the parent of `child`."""
        assert child.parent is not None
        if child.above is not None:
            child.above.below = head
        elif head is not None:
            self._orphans[child.parent] = head
        else:
            del self._orphans[child.parent]


def _siblings(block: Block | None) -> Iterator[Block]:
    while block is not None:
        yield block
        block = block.right
