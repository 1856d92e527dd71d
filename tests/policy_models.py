"""Policies written down as plainly as their definitions: one table, searched anew at every step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING

from kvortex.policies.ghosts import Ghosts
from kvortex.policies.reuse import ReuseDistance
from kvortex.policies.sketch import FrequencySketch

if TYPE_CHECKING:
    from collections.abc import Iterable, Set


class Model(ABC):
    """A table of keys, each in a named part and with the time at which it entered that part."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.part: dict[bytes, str] = {}
        self.since: dict[bytes, int] = {}
        self.clock = 0

    def put(self, key: bytes, part: str) -> None:
        self.clock += 1
        self.part[key], self.since[key] = part, self.clock

    def drop(self, key: bytes) -> None:
        del self.part[key], self.since[key]

    def keys(self, *parts: str) -> list[bytes]:
        """Of these parts, the oldest first."""
        found = [key for key, part in self.part.items() if part in parts]
        return sorted(found, key=lambda key: self.since[key])

    def oldest(self, part: str, pinned: Set[bytes] = frozenset()) -> bytes | None:
        return next((key for key in self.keys(part) if key not in pinned), None)

    def trim(self, part: str, most: int) -> None:
        """Forget the oldest keys of a part until it holds at most so many."""
        for key in self.keys(part)[: max(0, len(self.keys(part)) - most)]:
            self.drop(key)

    def expect(self, key: bytes) -> None:  # noqa: B027  (as in EvictionPolicy)
        ...

    @abstractmethod
    def insert(self, key: bytes) -> None: ...

    @abstractmethod
    def hit(self, key: bytes) -> None: ...

    @abstractmethod
    def evict(self, pinned: Set[bytes]) -> bytes | None: ...

    def remove(self, key: bytes) -> None:
        self.drop(key)


class ARCModel(Model):
    """Parts t1, t2 and their ghosts b1, b2, as in figure 4 of the paper; REPLACE is `evict`."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.p = 0.0
        self.wanted: bytes | None = None

    def expect(self, key: bytes) -> None:
        self.wanted = key
        b1, b2 = len(self.keys("b1")), len(self.keys("b2"))
        if self.part.get(key) == "b1":
            self.p = min(self.capacity, self.p + max(1.0, b2 / b1))
        elif self.part.get(key) == "b2":
            self.p = max(0, self.p - max(1.0, b1 / b2))

    def insert(self, key: bytes) -> None:
        if key in self.part:
            self.put(key, "t2")
            return
        self.put(key, "t1")
        self.trim("b1", max(0, self.capacity - len(self.keys("t1"))))
        self.trim("b2", max(0, 2 * self.capacity - len(self.keys("t1", "t2", "b1"))))

    def hit(self, key: bytes) -> None:
        self.put(key, "t2")

    def evict(self, pinned: Set[bytes]) -> bytes | None:
        t1 = len(self.keys("t1"))
        returns = self.wanted is not None and self.part.get(self.wanted) == "b2"
        first = t1 and (t1 > self.p or (returns and t1 == self.p))
        for part in ("t1", "t2") if first else ("t2", "t1"):
            victim = self.oldest(part, pinned)
            if victim is not None:
                self.put(victim, "b" + part[1])
                return victim
        return None


class MQModel(Model):
    """Parts are levels 0 to 7, and `ghost`; a table says uses and ends of lives."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.uses = Counter[bytes]()
        self.ends: dict[bytes, int] = {}
        self.accesses = 0

    def enter(self, key: bytes, level: int) -> None:
        self.put(key, str(level))
        self.ends[key] = self.accesses + self.capacity

    def use(self, key: bytes) -> None:
        self.accesses += 1
        self.uses[key] += 1
        self.enter(key, min(7, self.uses[key].bit_length() - 1))
        for level in range(1, 8):
            key_down = self.oldest(str(level))
            if key_down is not None and self.ends[key_down] < self.accesses:
                self.enter(key_down, level - 1)

    insert = hit = use

    def evict(self, pinned: Set[bytes]) -> bytes | None:
        for level in range(8):
            victim = self.oldest(str(level), pinned)
            if victim is not None:
                self.put(victim, "ghost")
                ghosts = self.keys("ghost")
                for key in ghosts[: max(0, len(ghosts) - 4 * self.capacity)]:
                    self.remove(key)
                return victim
        return None

    def remove(self, key: bytes) -> None:
        self.drop(key)
        del self.uses[key]


class S3FIFOModel(Model):
    """Parts small, main and ghost; uses are counted up to three."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.small_size = max(1, capacity // 10)
        self.uses: dict[bytes, int] = {}

    def insert(self, key: bytes) -> None:
        self.put(key, "main" if key in self.part else "small")
        self.uses[key] = 0

    def hit(self, key: bytes) -> None:
        self.uses[key] = min(3, self.uses[key] + 1)

    def evict(self, pinned: Set[bytes]) -> bytes | None:
        turns = [self.from_small, self.from_main]  # the second has what the first moves on
        if len(self.keys("small")) < self.small_size:
            turns.insert(0, self.from_main)
        for turn in turns:
            victim = turn(pinned)
            if victim is not None:
                return victim
        return None

    def from_small(self, pinned: Set[bytes]) -> bytes | None:
        for key in self.keys("small"):
            if self.uses[key] >= 2:
                self.put(key, "main")
                self.uses[key] = 0
            elif key in pinned:
                self.put(key, "small")
            else:
                self.put(key, "ghost")
                self.trim("ghost", self.capacity - self.small_size)
                return key
        return None

    def from_main(self, pinned: Set[bytes]) -> bytes | None:
        for _ in range(4):
            for key in self.keys("main"):
                if not self.uses[key] and key not in pinned:
                    self.drop(key)
                    return key
                self.put(key, "main")
                self.uses[key] = max(0, self.uses[key] - 1)
        return None


class WTinyLFUModel(Model):
    """Parts window, probation and protected; the sketch, which has a test of its own, is shared."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.window_size = max(1, capacity // 100)
        self.protected_size = int((capacity - self.window_size) * 0.8)
        self.sketch = FrequencySketch(capacity)

    def demote(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self.put(key, "probation")

    def insert(self, key: bytes) -> None:
        self.sketch.add(key)
        self.put(key, "window")
        self.demote(self.keys("window")[: -self.window_size])

    def hit(self, key: bytes) -> None:
        self.sketch.add(key)
        self.put(key, "window" if self.part[key] == "window" else "protected")
        protected = self.keys("protected")
        self.demote(protected[: max(0, len(protected) - self.protected_size)])

    def evict(self, pinned: Set[bytes]) -> bytes | None:
        candidate = self.oldest("window", pinned)
        victim = self.oldest("probation", pinned) or self.oldest("protected", pinned)
        if candidate and victim and len(self.keys("window")) < self.window_size:
            candidate = None
        leaving = candidate or victim
        if candidate and victim and self.sketch.count(candidate) > self.sketch.count(victim):
            self.demote([candidate])
            leaving = victim
        if leaving is not None:
            self.drop(leaving)
        return leaving


class LRUFreqModel(Model):
    """Parts are ranks 0 to 7; what has tests of its own, the usual wait and ghosts, is shared."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.reuse = ReuseDistance(capacity)
        self.ghosts = Ghosts(2 * capacity)
        self.uses: dict[bytes, int] = {}
        self.entered: dict[bytes, int] = {}

    def enter(self, key: bytes, rank: int) -> None:
        self.put(key, str(rank))
        self.entered[key] = self.reuse.now

    def insert(self, key: bytes) -> None:
        self.uses[key] = self.ghosts.pop(key) or 0
        self.hit(key)

    def hit(self, key: bytes) -> None:
        self.reuse.access(key)
        self.uses[key] += 1
        self.enter(key, min(7, self.uses[key].bit_length() - 1))
        for rank in range(1, 8):
            oldest = self.oldest(str(rank))
            if oldest is not None and self.entered[oldest] + self.reuse.typical < self.reuse.now:
                self.enter(oldest, rank - 1)

    def evict(self, pinned: Set[bytes]) -> bytes | None:
        for rank in range(8):
            victim = self.oldest(str(rank), pinned)
            if victim is not None:
                self.ghosts.put(victim, self.uses[victim])
                self.drop(victim)
                return victim
        return None


MODELS: dict[str, type[Model]] = {
    "arc": ARCModel,
    "lru_freq": LRUFreqModel,
    "mq": MQModel,
    "s3fifo": S3FIFOModel,
    "wtinylfu": WTinyLFUModel,
}
