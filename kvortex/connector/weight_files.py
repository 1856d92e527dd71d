"""Weight files: what tells the weights in a model's or an adapter's folder from others."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")
SAMPLES, SAMPLE_BYTES = 32, 4096
"""Of each file, evenly spread."""


class WeightFile(NamedTuple):
    """Of one file what changes with its content; to read it all takes minutes."""

    name: str
    target: str
    """What a link of that name leads to."""
    size: int
    mtime_ns: int
    sampled: str
    """Two models of one shape differ nearly everywhere; their times may have been set alike."""


def weight_files(
    model: str, revision: str | None, settings: str = "config.json"
) -> list[WeightFile]:
    """Those of a folder, or of what was downloaded under a name; none if it lies elsewhere.

    Args:
        model: path or name.
        revision: of a name.
        settings: a file that is in every such folder.
    """
    folder = _folder_of(model, revision, settings)
    if folder is None:
        return []
    return sorted(_facts(path) for path in folder.iterdir() if path.suffix in SUFFIXES)


def _facts(path: Path) -> WeightFile:
    facts = path.stat()
    sampled = _sampled(path, facts.st_size)
    return WeightFile(path.name, path.resolve().name, facts.st_size, facts.st_mtime_ns, sampled)


def _sampled(path: Path, size: int) -> str:
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(number * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _folder_of(model: str, revision: str | None, settings: str) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, settings, revision=revision)
    except HFValidationError:  # a path that is not there
        return None
    return Path(found).parent if isinstance(found, str) else None
