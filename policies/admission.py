"""Admission filters: whether a block that is not in a tier is worth a place, and a write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from .ghosts import Ghosts
from .sketch import FrequencySketch

SEEN_SHARE = 4
"""Times the capacity: keys that were refused and are recognised when they come again."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block stands in its request: its number from the start, and the request's blocks."""

    position: int = 0
    length: int = 1


class AdmissionFilter(ABC):
    """Asked once for every block that a tier does not have; one thread, like policies."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def hit(self, key: bytes) -> None:  # noqa: B027  (most filters need not know)
        """A resident key was used."""

    @abstractmethod
    def admit(self, key: bytes, place: Place) -> bool:
        """Whether to store the block. To be asked again for the same key later is usual."""


class Always(AdmissionFilter):
    """Everything is stored."""

    def admit(self, key: bytes, place: Place) -> bool:
        return True


class SecondSight(AdmissionFilter):
    """Only what was asked for before, and not too long ago."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._seen = Ghosts(SEEN_SHARE * capacity)

    def admit(self, key: bytes, place: Place) -> bool:
        if self._seen.pop(key) is not None:
            return True
        self._seen.put(key, 0)
        return False


class TinyLFU(AdmissionFilter):
    """What a frequency sketch has counted at least twice lately.

    Source: Einziger, Friedman, Manes, "TinyLFU: a highly efficient cache admission policy",
    ACM Transactions on Storage, 2017; there the victim's count is the border.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._sketch = FrequencySketch(capacity)

    def hit(self, key: bytes) -> None:
        self._sketch.add(key)

    def admit(self, key: bytes, place: Place) -> bool:
        self._sketch.add(key)
        return self._sketch.count(key) > 1
