"""RequestParams: what a client asked of KVortex for one request, through kv_transfer_params."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Self

from kvortex.core import shown

logger = logging.getLogger(__name__)
LIMITS = ("max_load_tokens", "max_offload_tokens")


@dataclass(frozen=True, slots=True)
class RequestParams:
    """Limits are tokens from the start of the prompt; None is none, and 0 leaves it alone.

    Their names are those that vLLM's own OffloadingConnector knows.
    """

    max_load_tokens: int | None = None
    max_offload_tokens: int | None = None
    explain: bool = False
    """Whether to tell what was loaded of the request, and why the rest was not."""

    @classmethod
    def of(cls, params: object) -> Self:
        """Read them, or None; what makes no sense is ignored, and logged."""
        told = params if isinstance(params, dict) else {}
        if params is not told and params is not None:
            logger.warning("kv_transfer_params=%s is ignored: it must be an object", shown(params))
        asked: dict[str, Any] = {}
        for name in (*LIMITS, "explain"):
            value = told.get(name)
            if type(value) is bool if name == "explain" else type(value) is int and value >= 0:
                asked[name] = value
            elif value is not None:
                must = "true or false" if name == "explain" else "a number of tokens"
                logger.warning("%s=%s is ignored: it must be %s", name, shown(value), must)
        return cls(**asked)
