"""A copy engine whose copies end when the test says so, well or not."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from kvortex.copy_engine import CopyEngine, CpuCopyEngine, Ticket
from kvortex.core import Direction, TransferError
from kvortex.host_pool import HostPool
from kvortex.layout import Layout, make_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvortex.cargo import Cargo
    from kvortex.verification import Verification

GARBAGE = 0xEE


class CommandedTicket(Ticket):
    """Copies when told to `finish`; told to `fail`, it leaves garbage at the destination."""

    def __init__(self, copy: Callable[[], Ticket], spoil: Callable[[], object]) -> None:
        self._copy, self._spoil = copy, spoil
        self._copied: Ticket | None = None
        self.ended = False
        self.failed = False

    def finish(self) -> None:
        assert not self.ended
        self._copied = self._copy()
        self.ended = True

    def fail(self) -> None:
        assert not self.ended
        self._spoil()
        self.ended = self.failed = True

    @property
    def done(self) -> bool:
        if self.failed:
            raise TransferError("failed on command")
        return self.ended

    @property
    def bad_block_ids(self) -> Sequence[int]:
        return self._copied.bad_block_ids if self._copied is not None else ()

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None or self.ended, "this would wait for ever"
        time.sleep(0 if self.ended else timeout or 0)
        return self.done


class CommandedCopyEngine(CopyEngine):
    """Wraps the CPU engine. `tickets` are all copies so far, `refuse` makes the next ones fail."""

    def __init__(
        self, layout: Layout, pool: HostPool, verification: Verification | None = None
    ) -> None:
        super().__init__(layout, pool, verification)
        self._inner = CpuCopyEngine(layout, pool, verification)
        self.tickets: list[CommandedTicket] = []
        self.directions: list[Direction] = []
        self.fenced: list[Ticket] = []
        self.refuse = False
        self.closed = False

    @property
    def waiting(self) -> list[CommandedTicket]:
        return [ticket for ticket in self.tickets if not ticket.ended]

    def _copy(self, direction: Direction, cargo: Cargo) -> Ticket:
        assert not self.closed
        if self.refuse:
            raise TransferError("refused on command")
        ticket = CommandedTicket(
            lambda: self._inner._copy(direction, cargo), lambda: self._spoil(direction, cargo)
        )
        self.tickets.append(ticket)
        self.directions.append(direction)
        return ticket

    def _load_layers(self, cargo: Cargo) -> list[Ticket]:
        """One copy after the other, each of which brings whole blocks."""
        return [self._copy(Direction.LOAD, cargo) for _ in self.layout.pages]

    def fence(self, ticket: Ticket) -> None:
        self.fenced.append(ticket)

    def close(self) -> None:
        for ticket in self.waiting:
            ticket.finish()
        self.closed = True

    def _spoil(self, direction: Direction, cargo: Cargo) -> None:
        if direction is Direction.STORE:
            self.pool.bytes[torch.from_numpy(cargo.slots)] = GARBAGE
        else:
            for page in self.layout.pages:
                page.view[torch.from_numpy(cargo.block_ids)] = GARBAGE


def open_commanded(
    layout: Layout,
    pool: HostPool,
    _num_streams: int,
    verification: Verification | None = None,
) -> CommandedCopyEngine:
    """Instead of `kvortex.worker.open_copy_engine`."""
    return CommandedCopyEngine(layout, pool, verification)


def commanded(num_blocks: int = 8, num_slots: int = 8, layers: str = "a") -> CommandedCopyEngine:
    """Over small tensors of its own in host memory; the pool is plain memory, too."""
    layout = make_layout({name: torch.zeros(num_blocks, 16, dtype=torch.uint8) for name in layers})
    return CommandedCopyEngine(layout, HostPool(num_slots, layout.slot_bytes, pinned=False))
