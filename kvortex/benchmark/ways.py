"""Ways of offloading that are compared: none, vLLM's own two, and KVortex."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvortex.config import KVortexConfig

NONE, NATIVE, SIMPLE, KVORTEX = "none", "native", "simple", "kvortex"
WAYS = {
    NONE: "vLLM alone",
    NATIVE: "OffloadingConnector",
    SIMPLE: "SimpleCPUOffloadConnector",
    KVORTEX: "KVortex",
}
"""What a person calls them."""


def kv_transfer_config(way: str, config: KVortexConfig) -> dict[str, Any] | None:
    """What vLLM is given for a way; all have as much host memory.

    OffloadingConnector stores generated tokens as well, as the others do by default.
    """
    if way == NONE:
        return None
    if way == KVORTEX:
        return config.kv_transfer_config()
    extra: dict[str, Any] = {"cpu_bytes_to_use": config.ram_pool_bytes}
    if way == NATIVE:
        extra["offload_prompt_only"] = False
    return {"kv_connector": WAYS[way], "kv_role": "kv_both", "kv_connector_extra_config": extra}
