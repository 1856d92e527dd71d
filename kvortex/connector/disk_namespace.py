"""What the bytes of a disk cache depend on beside their keys, and whether its keys outlive vLLM."""

from __future__ import annotations

import json
import os
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils

from kvortex.disk import Namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.config import ModelConfig, VllmConfig

    from kvortex.connector.geometry import Geometry
    from kvortex.layout import Layout

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")
SAMPLES, SAMPLE_BYTES = 32, 4096
"""Of each file, evenly spread."""


def namespace_of(vllm_config: VllmConfig, geometry: Geometry, layout: Layout) -> Namespace:
    """Where any of this differs the bytes of a block may, and another cache is used.

    Weights count by the names, sizes and times of their files, and by samples of what is in them:
    to read them all takes minutes.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    told: dict[str, Any] = {
        "model": model.model,
        "revision": str(model.revision),
        "dtype": str(model.dtype),
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
    pages = [(page.name, page.slot_offset, tuple(page.view.shape[1:])) for page in layout.pages]
    hidden = [pages, sorted(_weights(model)), str(model.hf_config.to_dict())]
    identity = blake2b(json.dumps([told, hidden]).encode(), digest_size=32).digest()
    return Namespace(identity, told)


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


def _layout_name(vllm_config: VllmConfig) -> str:
    """The order of a page's bytes, of which its runs need not tell."""
    chosen = getattr(vllm_config.cache_config, "kv_cache_layout", None)
    return str(chosen or os.getenv("VLLM_KV_CACHE_LAYOUT", ""))


def _backends(vllm_config: VllmConfig, geometry: Geometry) -> list[str]:
    """What reads the pages, each kind in an order of its own."""
    layers = vllm_config.compilation_config.static_forward_context
    known = [layers[name] for name in geometry.layer_names if name in layers]
    return sorted({layer.get_attn_backend().__qualname__ for layer in known})


def _weights(model: ModelConfig) -> Iterator[tuple[str, str, int, int, str]]:
    """Of each file what changes with its content."""
    folder = _folder_of(model)
    if folder is None:
        return
    for path in folder.iterdir():
        if path.suffix in WEIGHTS:
            facts = path.stat()
            target = path.resolve().name
            yield path.name, target, facts.st_size, facts.st_mtime_ns, _sampled(path, facts.st_size)


def _sampled(path: Path, size: int) -> str:
    """Two models of one shape differ nearly everywhere; their times may have been set alike."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(number * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _folder_of(model: ModelConfig) -> Path | None:
    """The local folder of a model, downloaded or not; None if it lies elsewhere."""
    if Path(model.model).is_dir():
        return Path(model.model)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model.model, "config.json", revision=model.revision)
    return Path(config).parent if isinstance(config, str) else None
