"""RequestLimits: what a client asked of KVortex for one request, through kv_transfer_params."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """In tokens from the start of the prompt; None is no limit and 0 leaves the request alone.

    The names are those that vLLM's own OffloadingConnector knows.
    """

    max_load_tokens: int | None = None
    max_offload_tokens: int | None = None

    @classmethod
    def of(cls, params: Mapping[str, object] | None) -> Self:
        """Read them; what is no such number is ignored, and logged."""
        limits: dict[str, int] = {}
        for field in fields(cls):
            value = (params or {}).get(field.name)
            if type(value) is int and value >= 0:
                limits[field.name] = value
            elif value is not None:
                logger.warning("%s=%r is ignored: it must be a number of tokens", field.name, value)
        return cls(**limits)
