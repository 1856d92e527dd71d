"""LayerGate: lets each layer of the model wait for its own part of a load. Worker side."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from kvortex.copy_engine import Ticket


class LayerGate:
    """Knows which layers wait, and hands each the ticket of its pages when it comes by.

    Layers come by through the model's own hooks, which a CUDA graph may replay without and some
    models do not have. They are trusted once one forward was seen in which every layer came, and
    never again after a layer did not come whose bytes were under way.

    Args:
        pages_of: layer name to the numbers of its pages; layers may share pages.
        fence: makes the model's stream wait for a ticket.
    """

    def __init__(
        self, pages_of: Mapping[str, Sequence[int]], fence: Callable[[Ticket], None]
    ) -> None:
        self._pages_of = pages_of
        self._fence = fence
        self._seen: set[str] = set()
        self._proven = False
        self._broken = False
        self._waiting: dict[int, Ticket] = {}

    def trusts(self, layers: Collection[str]) -> bool:
        """Whether all layers will come by in a forward that has hooks for `layers`."""
        return self._proven and not self._broken and all(name in layers for name in self._pages_of)

    def close(self, tickets: Sequence[Ticket]) -> None:
        """Hold every layer back until its pages have arrived.

        Args:
            tickets: of each page, in the layout's order.
        """
        self._waiting = dict(enumerate(tickets))

    def pass_through(self, layer: str) -> None:
        """A layer is about to read its pages."""
        if not self._proven:
            self._seen.add(layer)
        if self._waiting:
            for page in self._pages_of.get(layer, ()):
                ticket = self._waiting.pop(page, None)
                if ticket is not None:
                    self._fence(ticket)

    def end_forward(self) -> int:
        """The model ran: how many pages nobody waited for, and which it may have read too early."""
        if not self._proven:
            self._proven = self._seen.issuperset(self._pages_of)
            self._seen.clear()
        missed = len(self._waiting)
        if missed:
            self._broken = True
            for ticket in self._waiting.values():
                self._fence(ticket)  # what the stream does next finds them there
            self._waiting.clear()
        return missed
