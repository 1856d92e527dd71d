"""Verified: what `kvortex disk verify` found, and how it says so."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """Of one block."""

    GOOD = "good"
    CORRUPT = "corrupt"
    NOT_VERIFIABLE = "not_verifiable"
    UNREAD = "unread"
    CHANGED = "changed"


@dataclass(slots=True)
class Verified:
    """Blocks whose bytes are those that were written, and those whose are not."""

    caches_read: int = 0
    """That could be opened. Where there are none, that no block is bad says nothing."""
    good: int = 0
    corrupt: int = 0
    not_verifiable: int = 0
    """What the cache says of their checksums was not written by us."""
    unread: int = 0
    """The drive did not give their bytes."""
    changed: int = 0
    """A server wrote to their slots, or somebody removed them, before they were compared."""
    damaged_records: int = 0
    """Torn, or in the place of another: nobody can find their blocks any more."""
    not_served: int = 0
    """Whole records that no server looks for: written after a reset, or by another version."""
    disturbed: bool = False
    """A server opened a cache meanwhile, or a cache was removed."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Names below the `disk_path`, and why each."""
    untried: dict[str, str] = field(default_factory=dict)
    """Likewise, locks that cannot be tried: whether a server holds them is not known."""

    def count(self, verdict: Verdict) -> None:
        """One more block."""
        setattr(self, verdict, getattr(self, verdict) + 1)

    @property
    def blocks(self) -> int:
        """All of them."""
        return sum(getattr(self, verdict) for verdict in Verdict)

    @property
    def is_whole(self) -> bool:
        """Whether all that is there was compared and is good."""
        return self.good == self.blocks and not self.damaged_records and not self.unreadable

    def as_dict(self) -> dict[str, Any]:
        """Name to value."""
        return asdict(self)

    def __str__(self) -> str:
        told = f"{self.good} blocks are good, {self.corrupt} are corrupt"
        if self.not_verifiable:
            told += f", {self.not_verifiable} are not verifiable"
        if self.unread:
            told += f", {self.unread} could not be read"
        if self.changed:
            told += f", {self.changed} were changed before they were compared"
        if self.damaged_records:
            told += f"; {self.damaged_records} records are damaged, whose blocks are lost"
        if self.not_served:
            told += f"; {self.not_served} records are of no server's any more, and were left out"
        if self.disturbed:
            told += "\na server opened a cache meanwhile, or removed one to make room"
        for place, why in self.untried.items():
            told += f"\na server may be writing, nobody can tell: {place} {why}"
        return told
