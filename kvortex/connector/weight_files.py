"""Weight files: what tells the weights in a model's or an adapter's folder from others."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SUFFIXES = (*WEIGHTS, ".json", ".py")
WHOLE_BYTES = 64 << 20
"""A file of this size, or a smaller one, is read whole."""
STRIDE_BYTES, SAMPLE_BYTES = 2 << 20, 4096
"""Of a larger one a sample is read for each stride, so that every matrix of some size has its own:
of 140 GB in a second or two, as vLLM has just read them."""


class WeightFile(NamedTuple):
    """Of one file what changes with its content."""

    name: str
    target: str
    """What a link of that name leads to."""
    size: int
    mtime_ns: int
    sampled: str
    """Times may have been set alike, as where an image is built."""


def weight_files(
    model: str,
    revision: str | None,
    settings: str = "config.json",
    cache_dir: str | None = None,
) -> list[WeightFile]:
    """Those of a folder, or of what was downloaded under a name; none if it lies elsewhere.

    Args:
        model: path or name.
        revision: of a name.
        settings: a file that is in every such folder.
        cache_dir: where names are downloaded to; None is Hugging Face's own cache.
    """
    return sorted(map(_facts, _paths(model, revision, settings, cache_dir)))


def sees_weights(model: str, revision: str | None, cache_dir: str | None = None) -> bool:
    """Whether `weight_files` has more than settings to tell."""
    paths = _paths(model, revision, "config.json", cache_dir)
    return any(path.suffix in WEIGHTS for path in paths)


def _paths(model: str, revision: str | None, settings: str, cache_dir: str | None) -> list[Path]:
    if Path(model).is_file():
        return [Path(model)]
    folder = _folder_of(model, revision, settings, cache_dir)
    return [path for path in folder.iterdir() if path.suffix in SUFFIXES] if folder else []


def _facts(path: Path) -> WeightFile:
    facts = path.stat()
    sampled = _sampled(path, facts.st_size)
    return WeightFile(path.name, path.resolve().name, facts.st_size, facts.st_mtime_ns, sampled)


def _sampled(path: Path, size: int) -> str:
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            for start in (*range(0, size, STRIDE_BYTES), size - SAMPLE_BYTES):
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, start))
    return digest.hexdigest()


def _folder_of(
    model: str, revision: str | None, settings: str, cache_dir: str | None
) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, settings, cache_dir, revision)
    except HFValidationError:  # a path that is not there
        return None
    return Path(found).parent if isinstance(found, str) else None
