"""RequestParams: what a client asked of KVortex for one request, through kv_transfer_params."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Self

from kvortex.core import shown

logger = logging.getLogger(__name__)
LIMITS = ("max_load_tokens", "max_offload_tokens")
KNOWN = (*LIMITS, "explain")
MOST_TOLD = 16
_told: set[str] = set()


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
        for name in KNOWN:
            value = told.get(name)
            if type(value) is bool if name == "explain" else type(value) is int and value >= 0:
                asked[name] = value
            elif value is not None:
                must = "true or false" if name == "explain" else "a number of tokens"
                logger.warning("%s=%s is ignored: it must be %s", name, shown(value), must)
        _tell_unknown(set(told) - set(KNOWN))
        return cls(**asked)


def _tell_unknown(names: set[str]) -> None:
    """Once for each name, and of so many only: they come from clients."""
    for name in sorted(map(str, names)):
        if name not in _told and len(_told) < MOST_TOLD:
            _told.add(name)
            logger.warning(
                "kv_transfer_params: %.40r is ignored; KVortex knows %s", name, ", ".join(KNOWN)
            )
