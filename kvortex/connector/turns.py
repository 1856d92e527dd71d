"""Turns: how many requests run, and who is looked at first where none does. Scheduler side."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection


class Turns:
    """Lets no request that finds no room stand before those that hold theirs already.

    vLLM 0.26 looks no further once a request finds no room. Where nothing runs and those that
    were loaded stand behind it, no room would ever be made.
    """

    def __init__(self) -> None:
        self.running = 0
        """Requests of the last step and those that came since."""
        self._loaded: set[str] = set()
        """Those that waited apart for their load, which has ended, and did not run since."""

    def gives_way(self, request_id: str) -> bool:
        """Whether others are to be looked at before this one, whose turn it is now."""
        self._loaded.discard(request_id)
        return bool(self._loaded) and self.running == 0

    def comes(self) -> None:
        """A request has its blocks, and runs in the next step or once it is loaded."""
        self.running += 1

    def loaded(self, request_id: str) -> None:
        """What a request waited for apart has arrived, or failed."""
        self._loaded.add(request_id)

    def ran(self, request_ids: Collection[str]) -> None:
        """These are all that a step runs."""
        self._loaded.difference_update(request_ids if self._loaded else ())
        self.running = len(request_ids)

    def gone(self, request_id: str) -> None:
        """A request is finished, wherever it stood."""
        self._loaded.discard(request_id)
