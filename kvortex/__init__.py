"""KVortex keeps vLLM's KV blocks in host memory and brings them back when a prompt returns."""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # type checkers know the name, and importing `typing` takes its time
if TYPE_CHECKING:
    from kvortex.config import KVortexConfig
    from kvortex.core import (
        BlockNotFoundError,
        ClosedError,
        ConfigError,
        InvalidBlockError,
        KVortexError,
        LayoutError,
        PoolAllocationError,
        TransferError,
    )
    from kvortex.engine import KVortexEngine, Transfer

__version__ = "0.1.0"

__all__ = [
    "BlockNotFoundError",
    "ClosedError",
    "ConfigError",
    "InvalidBlockError",
    "KVortexConfig",
    "KVortexEngine",
    "KVortexError",
    "LayoutError",
    "PoolAllocationError",
    "Transfer",
    "TransferError",
]


_HOMES = {"KVortexConfig": "config", "KVortexEngine": "engine", "Transfer": "engine"}
"""Modules of the names above; those of errors are in `core`."""


def __getattr__(name: str) -> object:
    """Import what is asked for only then: torch comes with the engine, pydantic with settings."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"kvortex.{_HOMES.get(name, 'core')}"), name)
