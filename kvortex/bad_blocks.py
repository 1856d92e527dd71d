"""BadBlocks: GPU blocks of one step whose load failed, known once somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any, TypeVar

T = TypeVar("T")


class BadBlocks(Set[int]):
    """A set that waits for the step's loads as late as can be: when it is looked into.

    vLLM asks for it when a step was launched and reads it with the step's output, which comes after
    the loads. In between it prepares the next step, and would do so behind the loads if it had to
    wait for them here. It may look in another thread, and in another process finds a plain set.

    Args:
        found: added to until `wait` returns.
        wait: for the loads to end; called once, unless the first two come at the same time.
    """

    def __init__(self, found: set[int], wait: Callable[[], None]) -> None:
        self._found = found
        self._wait: Callable[[], None] | None = wait

    def __contains__(self, block_id: object) -> bool:
        return block_id in self._known()

    def __iter__(self) -> Iterator[int]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())

    def __reduce__(self) -> tuple[Any, ...]:
        return set, (self._known(),)

    def __repr__(self) -> str:
        return f"BadBlocks({'under way' if self._wait is not None else self._found})"

    @classmethod
    def _from_iterable(cls, members: Iterable[T]) -> set[T]:
        """What operators of sets return."""
        return set(members)

    def _known(self) -> set[int]:
        wait = self._wait
        if wait is not None:
            wait()
            self._wait = None
        return self._found
