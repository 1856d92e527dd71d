"""Eviction policies: who chooses the block to forget. Standard library only."""

from .base import EvictionPolicy
from .lfu import LFU
from .lru import LRU
from .lru_freq import LRUFreq

BUILT_IN: dict[str, type[EvictionPolicy]] = {"lru": LRU, "lfu": LFU, "lru_freq": LRUFreq}
"""Policies by the names under which the installed package also registers them."""

__all__ = ["BUILT_IN", "LFU", "LRU", "EvictionPolicy", "LRUFreq"]
