"""CostModel: whether loading beats computing, and how a load is best carried. Scheduler side."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_TOKENS = 256
"""Steps that compute fewer tell of the engine's overhead, not of prefill."""
WEIGHT = 0.2
LOAD_OVERHEAD_S = 2e-3
"""What a load costs beside its bytes: to plan it, launch it and learn of its end."""
PAUSE_S = 2e-3
"""Requests that run may be held up for so long; a load that takes longer runs beside them."""
HIDDEN_SHARE = 0.1
"""Loading layer by layer is up to a tenth slower, so the compute behind it must be worth that."""


@dataclass(slots=True)
class CostModel:
    """Times, from what workers measured of the link and the scheduler of prefill.

    A hit is loaded whole or not at all. To load a part of it is never sooner than the better of
    both: loading costs alike for every token, computing more for later ones, so that the sum is
    concave in the number that are loaded. Only a load that hides behind the compute of the rest
    could be, by at most its share of both times, for compute that other requests wait for.

    Until both are known, loading is assumed to pay. Speeds are tokens per second and bytes per
    second; `token_bytes` is what one token of a hit takes on the link of one rank, and
    `load_bytes_per_s` what large loads reached of late, with all that shared the link with them.
    """

    token_bytes: float
    prefill_tokens_per_s: float | None = None
    load_bytes_per_s: float | None = None

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step that computed so many tokens."""
        if num_tokens < LEAST_TOKENS or seconds <= 0:
            return
        speed = num_tokens / seconds
        if self.prefill_tokens_per_s is None:
            self.prefill_tokens_per_s = speed
        else:
            self.prefill_tokens_per_s += WEIGHT * (speed - self.prefill_tokens_per_s)

    def load_seconds(self, loaded: float) -> float:
        """Time of a load of so many tokens, once no other load is ahead of it."""
        if self.load_bytes_per_s is None:
            return 0.0
        return loaded * self.token_bytes / self.load_bytes_per_s

    def pays(
        self, num_tokens: int, loaded: float, ahead: float = 0, read_seconds: float = 0
    ) -> bool:
        """Whether a load beats computing `num_tokens` tokens.

        Args:
            num_tokens: of the hit.
            loaded: tokens that have to be loaded for it; fewer where layers look back to a window.
            ahead: tokens that others are loading.
            read_seconds: until they are in the host.
        """
        if self.prefill_tokens_per_s is None or self.load_bytes_per_s is None:
            return True
        loading = LOAD_OVERHEAD_S + read_seconds + self.load_seconds(loaded + ahead)
        return loading < num_tokens / self.prefill_tokens_per_s

    def pauses(self, loaded: float) -> bool:
        """Whether a step that waits for the load would hold up its other requests for long."""
        return self.load_seconds(loaded) > PAUSE_S

    def hides(self, loaded: float, computed: int) -> bool:
        """Whether a step computes long enough for its load to be worth hiding behind it."""
        if self.prefill_tokens_per_s is None:
            return computed >= loaded * HIDDEN_SHARE
        return computed / self.prefill_tokens_per_s >= HIDDEN_SHARE * self.load_seconds(loaded)
