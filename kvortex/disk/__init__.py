"""The disk tier of one worker: blocks of its host pool on a drive. Worker side."""

from kvortex.disk.format import Namespace, Survivors
from kvortex.disk.opening import disk_slots_in_pool
from kvortex.disk.report import DiskCounters, StoreReport
from kvortex.disk.store import DiskOptions, DiskStore

__all__ = [
    "DiskCounters",
    "DiskOptions",
    "DiskStore",
    "Namespace",
    "StoreReport",
    "Survivors",
    "disk_slots_in_pool",
]
