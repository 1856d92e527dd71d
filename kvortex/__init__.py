"""KVortex keeps vLLM's KV blocks in host memory and brings them back when a prompt returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
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


def __getattr__(name: str) -> object:
    """Import the engine, and torch with it, only when it is asked for."""
    if name in ("KVortexEngine", "Transfer"):
        from kvortex import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
