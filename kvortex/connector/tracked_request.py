"""TrackedRequest: what the scheduler side remembers of a request that vLLM has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from kvortex.connector.request_params import RequestParams

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvortex.connector.explanation import Explanation
    from kvortex.core import BlockKey


@dataclass(slots=True)
class TrackedRequest:
    """Its GPU blocks by KV cache group, and how many were considered for storing."""

    request: Request
    params: RequestParams
    mark: bytes = b""
    """In its keys: of its adapter's weights (see `Adapters`)."""
    block_ids: list[list[int]] = field(default_factory=list)
    considered: int = 0
    first: int = 0
    """Blocks that were on the GPU when vLLM asked last."""
    in_host: int = 0
    """Blocks up to which the host could restore it then."""
    unpaid: int = 0
    """Tokens of a hit that it was told then to compute."""
    unfetched: int = 0
    """Tokens of a hit on disk that was left there because it did not pay."""
    explanation: Explanation | None = None
    """Of its prompt, since it has blocks."""
    apart: bool = False
    """Whether it was told then to wait for its load while others run."""
    computed: int = 0
    """Tokens whose KV the steps planned so far compute or were told to be there."""
    touched: bool = False
    """Its use of blocks was counted."""
    stale: bool = False
    """Its bytes were computed before a reset; nothing of it may be stored."""
    _keys: dict[int, list[BlockKey]] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Request, mark: bytes = b"") -> TrackedRequest:
        """Nothing is known of it yet but what its client asked for."""
        return cls(request, RequestParams.of(request.kv_transfer_params), mark)

    def keys(self, group: int, first: int, last: int) -> list[BlockKey]:
        """Of the blocks from `first` up to before `last`, as far as their tokens are known."""
        known = self._keys.setdefault(group, [])
        hashes = self.request.block_hashes
        if known and not self._is_key(known[-1], len(known) - 1):
            known.clear()  # tokens were replaced, as in vLLM's sessions
        if len(known) < len(hashes):
            suffix = self.mark + make_block_hash_with_group_id(BlockHash(b""), group)
            known += [block_hash + suffix for block_hash in hashes[len(known) :]]
        return known[first:last]

    def _is_key(self, key: BlockKey, number: int) -> bool:
        """Whether it is that of a block still; then those of all blocks before it are, too."""
        hashes = self.request.block_hashes
        return number < len(hashes) and key.startswith(hashes[number])

    def parents(self, group: int, first: int, last: int) -> list[BlockKey | None]:
        """Of the same blocks, the key before each; the first of all has none."""
        if first:
            return [*self.keys(group, first - 1, last - 1)]
        return [None, *self.keys(group, 0, last - 1)]

    def compute_again(self, first: int) -> None:
        """Have vLLM compute its tokens from `first` on again.

        vLLM itself lets all but the first of those that share a block go on behind it, and counts
        wrongly if it has planned a next step already.
        """
        request = self.request
        request.num_computed_tokens = min(request.num_computed_tokens, first)
        request.spec_token_ids = []
        self.drop_output()

    def drop_output(self) -> None:
        """Have vLLM forget what the steps under way sample for this request.

        Its scheduler does the same where it preempts all of them to reset its cache.
        """
        request = self.request
        if hasattr(request, "num_stale_output_tokens"):  # since vLLM 0.32
            request.drop_stale_output = True
            request.num_stale_output_tokens = request.num_in_flight_tokens
        else:  # counts outputs to come; that of the step just reported is among the placeholders
            request.async_tokens_to_discard = min(
                request.num_output_placeholders, request.num_in_flight_tokens
            )
        request.num_output_placeholders = 0

    def most_loaded(self, num_tokens: int) -> int:
        """How many leading tokens of so many may be loaded."""
        return _at_most(self.params.max_load_tokens, num_tokens)

    def most_stored(self, num_tokens: int) -> int:
        """How many leading tokens of so many may be stored."""
        return _at_most(self.params.max_offload_tokens, num_tokens)


def _at_most(limit: int | None, num_tokens: int) -> int:
    return num_tokens if limit is None else min(limit, num_tokens)
