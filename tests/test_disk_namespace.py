"""What makes another cache of a disk's folder, and whether its keys outlive vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvortex.layout import make_layout
from kvortex.prefix_match import Reach

if TYPE_CHECKING:
    from collections.abc import Callable

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


class Attention:
    """A layer of vLLM's, whose backend is named by its class."""

    def __init__(self, backend: str) -> None:
        self._backend = type(backend, (), {})

    def get_attn_backend(self) -> type:
        return self._backend


def config(folder: Path) -> Any:
    """As much of a VllmConfig as is looked at, over a model in a folder."""
    (folder / "model.safetensors").write_bytes(b"weights")
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folder),
            revision=None,
            dtype=torch.float16,
            quantization=None,
            seed=0,
            max_model_len=4096,
            hf_config=SimpleNamespace(to_dict=lambda: {"rope_theta": 1}),
        ),
        parallel_config=SimpleNamespace(
            world_size=2,
            tensor_parallel_size=2,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            cp_kv_cache_interleave_size=1,
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto", prefix_caching_hash_algo="sha256", kv_cache_layout="NHD"
        ),
        load_config=SimpleNamespace(load_format="auto", download_dir=None),
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context={"a": Attention("Flash")}),
    )


def identity(told: Any, page_bytes: int = 16) -> bytes:
    from kvortex.connector.disk_namespace import namespace_of
    from kvortex.connector.geometry import Geometry

    geometry = Geometry(("a",), (Reach(),), 8, 16, page_bytes, told.parallel_config.world_size)
    layout = make_layout({"a": torch.zeros(8, page_bytes, dtype=torch.uint8)})
    return namespace_of(told, geometry, layout).identity


def touched(told: Any) -> None:
    path = Path(told.model_config.model) / "model.safetensors"
    path.write_bytes(b"other weights")


CHANGES: dict[str, Callable[[Any], object]] = {
    "weights": touched,
    "more weights": lambda c: (Path(c.model_config.model) / "2.safetensors").write_bytes(b"x"),
    "revision": lambda c: setattr(c.model_config, "revision", "v2"),
    "dtype": lambda c: setattr(c.model_config, "dtype", torch.bfloat16),
    "longest request": lambda c: setattr(c.model_config, "max_model_len", 8192),
    "images' settings": lambda c: setattr(
        c.model_config, "multimodal_config", SimpleNamespace(mm_processor_kwargs={"size": 1})
    ),
    "model's code": lambda c: (Path(c.model_config.model) / "modeling.py").write_text("x"),
    "quantization": lambda c: setattr(c.model_config, "quantization", "fp8"),
    "model's config": lambda c: setattr(
        c.model_config, "hf_config", SimpleNamespace(to_dict=lambda: {"rope_theta": 2})
    ),
    "cache's dtype": lambda c: setattr(c.cache_config, "cache_dtype", "fp8"),
    "cache's layout": lambda c: setattr(c.cache_config, "kv_cache_layout", "HND"),
    "hash": lambda c: setattr(c.cache_config, "prefix_caching_hash_algo", "sha256_cbor"),
    "pipeline": lambda c: setattr(c.parallel_config, "pipeline_parallel_size", 2),
    "interleaving": lambda c: setattr(c.parallel_config, "cp_kv_cache_interleave_size", 8),
    "backend": lambda c: c.compilation_config.static_forward_context.update(a=Attention("Other")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_where_the_bytes_may_differ_the_cache_does(change: str, tmp_path: Path) -> None:
    told = config(tmp_path)
    before = identity(told)
    assert identity(told) == before
    CHANGES[change](told)
    assert identity(told) != before


def with_draft(told: Any, folder: Path, weights: bytes = b"weights") -> Any:
    """The same, and a draft model in another folder."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    draft = SimpleNamespace(**vars(told.model_config) | {"model": str(folder)})
    told.speculative_config = SimpleNamespace(draft_model_config=draft)
    return told


def test_a_draft_models_weights_are_in_the_blocks_too(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    told, draft = config(tmp_path / "target"), tmp_path / "draft"
    found = [identity(told), identity(with_draft(told, draft))]
    assert identity(told) == found[1]
    found.append(identity(with_draft(told, draft, b"trained")))
    told.speculative_config.draft_model_config.revision = "v2"
    found.append(identity(told))
    assert len(set(found)) == 4


def test_drafts_without_weights_of_their_own_change_nothing(tmp_path: Path) -> None:
    """vLLM names the model itself where n-grams are proposed."""
    told = config(tmp_path)
    before = identity(told)
    told.speculative_config = SimpleNamespace(draft_model_config=told.model_config)
    assert identity(told) == before
    told.speculative_config = SimpleNamespace()
    assert identity(told) == before


@pytest.mark.parametrize("megabytes", [1, 70])
def test_one_changed_matrix_is_seen_whatever_the_times_say(megabytes: int, tmp_path: Path) -> None:
    """Of two MiB in a large file; anywhere in a small one."""
    told, path = config(tmp_path), tmp_path / "model.safetensors"
    size, changed = megabytes << 20, 1 if megabytes == 1 else 2 << 20

    def written(start: int, count: int) -> bytes:
        content = bytearray(size)
        content[start : start + count] = b"x" * count
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
        return identity(told)

    before = written(0, 0)
    for start in (0, 5000, size - changed):
        assert written(start, changed) != before
    assert written(0, 0) == before


def test_weights_elsewhere_are_known_by_their_revision_only(tmp_path: Path) -> None:
    from kvortex.connector.disk_namespace import weights_are_known

    told = config(tmp_path)
    assert weights_are_known(told)
    single = tmp_path / "model.gguf"
    single.write_bytes(b"weights")
    told.model_config.model = str(single)
    assert weights_are_known(told)
    before = identity(told)
    single.write_bytes(b"others")
    assert identity(told) != before
    (tmp_path / "settings only").mkdir()
    (tmp_path / "settings only" / "config.json").write_text("{}")
    for place in (tmp_path / "settings only", "s3://bucket/model", "who/never-downloaded"):
        told.model_config.model, told.model_config.revision = str(place), None
        assert not weights_are_known(told)
        told.model_config.revision = "v1"
        assert weights_are_known(told)
    told.model_config.revision = None
    told.load_config.load_format = "dummy"
    assert weights_are_known(told)


def test_what_was_downloaded_elsewhere_is_found_there(tmp_path: Path) -> None:
    from kvortex.connector.disk_namespace import weights_are_known

    told = config(tmp_path)
    told.model_config.model = "who/what"
    snapshot = tmp_path / "models--who--what" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    told.load_config.download_dir = str(tmp_path)
    assert not weights_are_known(told)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    assert weights_are_known(told)
    before = identity(told)
    (snapshot / "model.safetensors").write_bytes(b"others!")
    assert identity(told) != before


def test_scales_that_are_drawn_at_start_do_not_last() -> None:
    from kvortex.connector.disk_namespace import bytes_last

    for scales, last in ((True, False), (False, True)):
        told: Any = SimpleNamespace(cache_config=SimpleNamespace(calculate_kv_scales=scales))
        assert bytes_last(told) is last
    assert bytes_last(config_without_scales())


def config_without_scales() -> Any:
    """As of newer versions of vLLM."""
    return SimpleNamespace(cache_config=SimpleNamespace())


def test_pages_of_another_size_and_another_hash_seed_make_another_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = config(tmp_path)
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    found = {identity(told), identity(told, page_bytes=32)}
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert len(found | {identity(told)}) == 3


def test_random_weights_differ_by_seed_and_others_do_not(tmp_path: Path) -> None:
    told = config(tmp_path)
    found = []
    for load_format in ("auto", "dummy"):
        told.load_config.load_format = load_format
        for seed in (0, 1):
            told.model_config.seed = seed
            found.append(identity(told))
    assert found[0] == found[1]
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("algorithm", "last"),
    [("sha256", True), ("sha256_cbor", True), ("xxhash", False), ("xxhash_cbor", False)],
)
def test_keys_last_where_the_hash_has_a_seed_that_does(
    algorithm: str, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core import kv_cache_utils

    from kvortex.connector.disk_namespace import keys_last

    told: Any = SimpleNamespace(cache_config=SimpleNamespace(prefix_caching_hash_algo=algorithm))
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    own = hasattr(kv_cache_utils, "resolve_none_hash_seed")  # since vLLM 0.27
    assert keys_last(told) is (last and own)
    monkeypatch.setattr(kv_cache_utils, "resolve_none_hash_seed", None, raising=False)
    monkeypatch.delattr(kv_cache_utils, "resolve_none_hash_seed")
    assert keys_last(told) is False
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert keys_last(told) is True
