"""What KVortex needs to know of vLLM's KV cache configuration, on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

WHOLE_PREFIX_SPECS = (FullAttentionSpec, MLAAttentionSpec)
"""Kinds of attention for which a prefix is usable exactly if every one of its blocks is there."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The one KV cache group that is offloaded."""

    layer_names: tuple[str, ...]
    num_gpu_blocks: int
    block_tokens: int
    """Tokens of one block, over all context-parallel ranks."""
    slot_bytes: int
    """Bytes of one block on this rank, for the scheduler on the first: where layers are spread
    unevenly over pipeline stages, ranks differ."""
    num_ranks: int


def unsupported(kv_cache_config: KVCacheConfig) -> str | None:
    """Why this model's KV cache is not offloaded; None if it is."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"it has {len(groups)} KV cache groups and only one is supported"
    spec = groups[0].kv_cache_spec
    if all(type(layer) in WHOLE_PREFIX_SPECS for layer in _layer_specs(spec)):
        return None
    return f"its KV cache is of kind {type(spec).__name__}, not full attention or MLA"


def geometry_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Geometry:
    """Read off a supported configuration.

    The size of a block comes from the tensors: of layers that differ, the scheduler is told the
    specification of the first only.
    """
    num_blocks = kv_cache_config.num_blocks
    return Geometry(
        layer_names=tuple(kv_cache_config.kv_cache_groups[0].layer_names),
        num_gpu_blocks=num_blocks,
        block_tokens=resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)[0],
        slot_bytes=_allocated_bytes(kv_cache_config) // num_blocks,
        num_ranks=vllm_config.parallel_config.world_size,
    )


def _allocated_bytes(kv_cache_config: KVCacheConfig) -> int:
    """Since vLLM 0.32 all tensors lie in one allocation, whose size each of them names."""
    sizes = [tensor.size for tensor in kv_cache_config.kv_cache_tensors]
    one_allocation = hasattr(kv_cache_config.kv_cache_tensors[0], "layer_stride")
    return max(sizes) if one_allocation else sum(sizes)


def _layer_specs(spec: KVCacheSpec) -> list[KVCacheSpec]:
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return list(spec.kv_cache_specs.values())
    return [spec]
