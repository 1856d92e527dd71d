"""Has a vLLM on the CPU run a step ahead of what it knows, as on GPUs; it would not by itself."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pytest


class _AtOnce:
    """A stream or an event where nothing is under way."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, _: Any) -> None: ...


def let_cpu_run_ahead(patch: pytest.MonkeyPatch) -> None:
    """Where `async_scheduling` is asked for; the first model runner's code is that of GPUs."""
    if torch.cuda.is_available():
        return
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def checked(config: Any) -> None:
        ahead = config.scheduler_config.async_scheduling
        check(config)
        config.scheduler_config.async_scheduling = ahead

    patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(checked))
    patch.setattr(torch.cuda, "Event", _AtOnce)
    patch.setattr(torch.cuda, "current_stream", _AtOnce)
    patch.setattr(torch.cuda, "stream", nullcontext)
