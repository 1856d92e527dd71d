"""Explanation: where the tokens of one request's prompt came from. Scheduler side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvortex.metrics import MissReason

if TYPE_CHECKING:
    from kvortex.connector.tracked_request import TrackedRequest
    from kvortex.scheduler import OffloadScheduler


@dataclass(frozen=True, slots=True)
class Explanation:
    """Tokens in whole blocks; the last token of a prompt is computed in any case."""

    gpu_tokens: int
    loaded_tokens: int
    missed_tokens: dict[MissReason, int]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        missed = {reason.value: tokens for reason, tokens in self.missed_tokens.items()}
        return asdict(self) | {"missed_tokens": missed}

    def __str__(self) -> str:
        missed = [f"{tokens} {reason}" for reason, tokens in self.missed_tokens.items()]
        computed = f"computed: {', '.join(missed)}" if missed else "nothing computed"
        return f"{self.gpu_tokens} tokens were on the GPU, {self.loaded_tokens} loaded, {computed}"


def explain(
    tracked: TrackedRequest, num_loaded: int, offload: OffloadScheduler, block_tokens: int
) -> Explanation:
    """Of a request that vLLM gives its blocks for the first time.

    What did not pay is known to the token. What lies behind it has one reason, that of the first
    block of it, without which the others are of no use.
    """
    whole = (tracked.request.num_tokens - 1) // block_tokens
    on_gpu = tracked.first * block_tokens
    missing = max(0, whole * block_tokens - on_gpu - num_loaded)
    unpaid = min(missing, tracked.unpaid + tracked.unfetched)
    rest = missing - unpaid
    missed = {}
    if unpaid:
        missed[MissReason.NOT_WORTH_LOADING] = unpaid
    if rest:
        missed[_why(tracked, whole - rest // block_tokens, offload, block_tokens)] = rest
    return Explanation(on_gpu, num_loaded, missed)


def _why(
    tracked: TrackedRequest, position: int, offload: OffloadScheduler, block_tokens: int
) -> MissReason:
    """The reason of a block, in the first KV cache group that lacks it."""
    end = (position + 1) * block_tokens
    if tracked.request.skip_reading_prefix_cache or tracked.most_loaded(end) < end:
        return MissReason.LIMIT
    for group in range(len(tracked.block_ids)):
        (key,) = tracked.keys(group, position, position + 1)
        if offload.tier.lookup(key) is None:
            return offload.why_missing(key)
    return MissReason.LATE
