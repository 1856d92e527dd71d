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
            _tell(f"kv_transfer_params={shown(params)} is ignored: it must be an object")
        asked: dict[str, Any] = {}
        for name in KNOWN:
            value = told.get(name)
            if type(value) is bool if name == "explain" else type(value) is int and value >= 0:
                asked[name] = value
            elif value is not None:
                must = "true or false" if name == "explain" else "a number of tokens"
                _tell(f"{name}={shown(value)} is ignored: it must be {must}")
        for name in sorted(map(str, set(told) - set(KNOWN))):
            known = ", ".join(KNOWN)
            _tell(f"kv_transfer_params: {name!r:.40} is ignored; KVortex knows {known}")
        return cls(**asked)


def _tell(line: str) -> None:
    """Once, and of so many only: clients may send anything, with every request."""
    if line not in _told and len(_told) < MOST_TOLD:
        _told.add(line)
        logger.warning("%s", line)
