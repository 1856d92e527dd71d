"""What the bytes of a disk cache depend on beside their keys, and whether its keys outlive vLLM."""

from __future__ import annotations

import json
import os
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import vllm
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils

from kvortex.connector.weight_files import sees_weights, weight_files
from kvortex.disk import Namespace

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from kvortex.connector.geometry import Geometry
    from kvortex.layout import Layout


def namespace_of(vllm_config: VllmConfig, geometry: Geometry, layout: Layout) -> Namespace:
    """Where any of this differs the bytes of a block may, and another cache is used.

    Weights count by their files (see `weight_files`), also those of a draft model, whose layers
    have pages in a block, too. Those of LoRA adapters are in the keys (see `Adapters`).
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    told: dict[str, Any] = {
        "model": model.model,
        "revision": str(model.revision),
        "dtype": str(model.dtype),
        # LongRoPE and attention temperature depend on it.
        "max_model_len": model.max_model_len,
        "multimodal_processor": str(_processor_settings(model)),
        "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "kv_cache_layout": _layout_name(vllm_config),
        "attention": ", ".join(_backends(vllm_config, geometry)),
        "quantization": str(model.quantization),
        "block_tokens": geometry.block_tokens,
        "ranks": parallel.world_size,
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "decode_context_parallel": parallel.decode_context_parallel_size,
        "context_interleave": getattr(parallel, "cp_kv_cache_interleave_size", 1),
        "prefix_hash": vllm_config.cache_config.prefix_caching_hash_algo,
        "prefix_hash_seed": os.getenv("PYTHONHASHSEED", ""),
        "vllm": vllm.__version__,
    }
    if vllm_config.load_config.load_format == "dummy":
        told["random_weights"] = model.seed
    models = _models(vllm_config)
    if len(models) > 1:
        told["draft_model"] = ", ".join(_naming(models[1]))
    folder = vllm_config.load_config.download_dir
    weights = [
        (weight_files(m.model, m.revision, cache_dir=folder), str(m.hf_config.to_dict()))
        for m in models
    ]
    pages = [(page.name, page.slot_offset, tuple(page.view.shape[1:])) for page in layout.pages]
    identity = blake2b(json.dumps([told, pages, weights]).encode(), digest_size=32).digest()
    return Namespace(identity, told)


def weights_are_known(vllm_config: VllmConfig) -> bool:
    """Whether other weights would make another cache: their files are to be seen here, or the user
    vouches for them by naming a revision."""
    load = vllm_config.load_config
    return load.load_format == "dummy" or all(
        model.revision or sees_weights(model.model, model.revision, load.download_dir)
        for model in _models(vllm_config)
    )


def bytes_last(vllm_config: VllmConfig) -> bool:
    """Whether the bytes of a block will be the same in the next life of this server."""
    return not getattr(vllm_config.cache_config, "calculate_kv_scales", False)


def keys_last(vllm_config: VllmConfig) -> bool:
    """Whether a prompt will have the same keys in the next life of this server."""
    if os.getenv("PYTHONHASHSEED") is not None:
        return True
    try:  # since vLLM 0.27; before, every start drew a root of its own
        seed_of = kv_cache_utils.resolve_none_hash_seed
    except AttributeError:
        return False
    hash_fn = get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo)
    return bool(seed_of(hash_fn) == seed_of(hash_fn))


def _models(vllm_config: VllmConfig) -> list[ModelConfig]:
    """The model, and the one that drafts for it, if that is another."""
    model = vllm_config.model_config
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    if draft is None or _naming(draft) == _naming(model):  # as with n-grams it is the model
        return [model]
    return [model, draft]


def _processor_settings(model: ModelConfig) -> object:
    """Those of the server, which need not be in the hash of an image."""
    return getattr(getattr(model, "multimodal_config", None), "mm_processor_kwargs", None)


def _naming(model: ModelConfig) -> tuple[str, ...]:
    """What its weights are called, and how they are used."""
    return model.model, str(model.revision), str(model.dtype), str(model.quantization)


def _layout_name(vllm_config: VllmConfig) -> str:
    """The order of a page's bytes, of which its runs need not tell."""
    chosen = getattr(vllm_config.cache_config, "kv_cache_layout", None)
    return str(chosen or os.getenv("VLLM_KV_CACHE_LAYOUT", ""))


def _backends(vllm_config: VllmConfig, geometry: Geometry) -> list[str]:
    """What reads the pages, each kind in an order of its own."""
    layers = vllm_config.compilation_config.static_forward_context
    known = [layers[name] for name in geometry.layer_names if name in layers]
    return sorted({layer.get_attn_backend().__qualname__ for layer in known})
