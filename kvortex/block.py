"""Block: a key's hold on one slot of a tier, and its links to others. Scheduler side."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvortex.core import BlockKey


class State(Enum):
    """A slot's holder is promised bytes, has them, or only waits for its last reader."""

    RESERVED = "reserved"
    RESIDENT = "resident"
    CONDEMNED = "condemned"


@dataclass(slots=True, eq=False)
class Block:
    """A key's hold on one slot. `order` grows with every reservation.

    `parent` is the key of the block before it in its request, if told; the links below it are
    kept by PrefixTree. `seed` is what the checksum of its bytes starts from; `since` when they
    came, in seconds of the monotonic clock, and `from_disk` where from. A `quarantined` block's
    slot is given to nobody after it.
    """

    key: BlockKey
    slot: int
    order: int
    state: State = State.RESERVED
    pins: int = 0
    parent: BlockKey | None = None
    seed: int = 0
    since: float = 0.0
    from_disk: bool = False
    quarantined: bool = False
    above: Block | None = None
    below: Block | None = None
    left: Block | None = None
    right: Block | None = None
