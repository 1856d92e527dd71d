"""What KVortex needs to know of vLLM's KV cache configuration, on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvortex.prefix_match import Reach

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

CAN_NAME_REQUESTS = hasattr(KVConnectorBase_V1, "get_transfer_results")
"""Whether vLLM can be told which requests failed to load: since 0.32."""
WHOLE_PREFIX_SPECS = (FullAttentionSpec, MLAAttentionSpec)
"""Kinds of attention that look back to the beginning."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The KV cache groups that are offloaded: all that the model has."""

    layer_names: tuple[str, ...]
    """Of all groups."""
    reaches: tuple[Reach, ...]
    """Of each group."""
    num_gpu_blocks: int
    block_tokens: int
    """Tokens of one block of any group, over all context-parallel ranks."""
    slot_bytes: int
    """Bytes of one block on this rank, for the scheduler on the first: where layers are spread
    unevenly over pipeline stages, ranks differ."""
    num_ranks: int

    @property
    def names_failed_blocks(self) -> bool:
        """Whether vLLM is told which blocks failed to load, and computes again from the first one.

        It has no channel for that with several groups, and a window's earlier blocks are not there.
        So where it can be told of requests instead it is; then each has to wait apart for its load.
        """
        return self.reaches == (Reach(),) or not CAN_NAME_REQUESTS


def unsupported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    """Why this model's KV cache is not offloaded; None if it is."""
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    if not specs:
        return "it has no KV cache"
    if not vllm_config.cache_config.enable_prefix_caching:
        return "prefix caching is off, by configuration or because vLLM cannot do it for this model"
    for spec in specs:
        if _reach_of(spec) is None:
            return (
                f"its KV cache has a group of kind {type(spec).__name__}; only full, MLA, "
                "sliding-window and chunked local attention can be restored"
            )
    sizes = {spec.block_size for spec in specs}
    if len(sizes) > 1:
        return f"its KV cache groups have blocks of different sizes, {sorted(sizes)} tokens"
    sizes |= set(resolve_kv_cache_block_sizes(kv_cache_config, vllm_config))
    if len(specs) > 1 and len(sizes) > 1:
        return f"its blocks are hashed or spread over ranks by parts, {sorted(sizes)} tokens"
    return None


def geometry_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Geometry:
    """Read off a supported configuration.

    The size of a block comes from the tensors: of layers that differ, the scheduler is told the
    specification of the first only. Groups share the tensors, so a block of any has the same size.
    """
    num_blocks = kv_cache_config.num_blocks
    groups = kv_cache_config.kv_cache_groups
    return Geometry(
        layer_names=tuple(name for group in groups for name in group.layer_names),
        reaches=tuple(_reach_of(group.kv_cache_spec) or Reach() for group in groups),
        num_gpu_blocks=num_blocks,
        block_tokens=resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)[0],
        slot_bytes=_allocated_bytes(kv_cache_config) // num_blocks,
        num_ranks=vllm_config.parallel_config.world_size,
    )


def _reach_of(spec: KVCacheSpec) -> Reach | None:
    """How far back a group's layers look; None if its blocks cannot be restored one by one."""
    reaches = {_layer_reach(layer) for layer in _layer_specs(spec)}
    return reaches.pop() if len(reaches) == 1 else None


def _layer_reach(spec: KVCacheSpec) -> Reach | None:
    if type(spec) in WHOLE_PREFIX_SPECS:
        return Reach()
    if type(spec) is SlidingWindowSpec:
        return Reach(window=spec.sliding_window + getattr(spec, "extra_retained_tokens", 0))
    if type(spec) is ChunkedLocalAttentionSpec:
        return Reach(chunk=spec.attention_chunk_size)
    return None


def _allocated_bytes(kv_cache_config: KVCacheConfig) -> int:
    """Since vLLM 0.32 all tensors lie in one allocation, whose size each of them names."""
    sizes = [tensor.size for tensor in kv_cache_config.kv_cache_tensors]
    one_allocation = hasattr(kv_cache_config.kv_cache_tensors[0], "layer_stride")
    return max(sizes) if one_allocation else sum(sizes)


def _layer_specs(spec: KVCacheSpec) -> list[KVCacheSpec]:
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return list(spec.kv_cache_specs.values())
    return [spec]
