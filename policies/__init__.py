"""Eviction policies and admission filters: which blocks a tier keeps. Standard library only."""

from .adaptive import Adaptive
from .admission import AdmissionFilter, Always, Place, SecondSight, TinyLFU
from .arc import ARC
from .base import EvictionPolicy
from .fifo import FIFO
from .lfu import LFU
from .lru import LRU
from .lru_freq import LRUFreq
from .mq import MQ
from .s3fifo import S3FIFO
from .sieve import Sieve
from .wtinylfu import WTinyLFU

BUILT_IN: dict[str, type[EvictionPolicy]] = {
    "arc": ARC,
    "fifo": FIFO,
    "lfu": LFU,
    "lru": LRU,
    "lru_freq": LRUFreq,
    "mq": MQ,
    "s3fifo": S3FIFO,
    "sieve": Sieve,
    "wtinylfu": WTinyLFU,
}
"""Policies by the names under which the installed package also registers them."""

ADMISSIONS: dict[str, type[AdmissionFilter]] = {
    "adaptive": Adaptive,
    "always": Always,
    "second_sight": SecondSight,
    "tinylfu": TinyLFU,
}
"""Admission filters by name."""

__all__ = [
    "ADMISSIONS",
    "ARC",
    "BUILT_IN",
    "FIFO",
    "LFU",
    "LRU",
    "MQ",
    "S3FIFO",
    "Adaptive",
    "AdmissionFilter",
    "Always",
    "EvictionPolicy",
    "LRUFreq",
    "Place",
    "SecondSight",
    "Sieve",
    "TinyLFU",
    "WTinyLFU",
]
