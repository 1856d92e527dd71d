"""CLOCK for KVortex: a FIFO queue in which a block that was used gets a second chance."""

from collections import OrderedDict
from collections.abc import Callable

from kvortex.policies import EvictionPolicy


class Clock(EvictionPolicy):
    """Source: Corbato, "A paging experiment with the Multics system", 1968."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._used: OrderedDict[bytes, bool] = OrderedDict()

    def insert(self, key: bytes) -> None:
        self._used[key] = False

    def hit(self, key: bytes) -> None:
        self._used[key] = True

    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        for _ in range(2 * len(self._used)):
            key, used = self._used.popitem(last=False)
            if not used and not pinned(key):
                return key
            self._used[key] = used and pinned(key)
        return None

    def remove(self, key: bytes) -> None:
        del self._used[key]
