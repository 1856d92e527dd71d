"""Keys of LoRA adapters: the same after a restart as long as the weights are, and others after."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvortex import KVortexConfig
from kvortex.prefix_match import Reach

if TYPE_CHECKING:
    from pathlib import Path

    from kvortex.connector.adapters import Adapters
    from kvortex.connector.scheduler_side import SchedulerSide

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

HASHES = [bytes([number]) * 32 for number in range(4)]


def adapter(folder: Path, weights: bytes = b"weights", **settings: Any) -> Any:
    """A LoRARequest whose files are in a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return named(folder, **settings)


def named(folder: Path | str, **settings: Any) -> Any:
    lora = {"lora_name": "a", "lora_int_id": 1, "lora_path": str(folder), "load_inplace": False}
    return SimpleNamespace(**lora | settings)


def new() -> Adapters:
    """Of a life that begins."""
    from kvortex.connector.adapters import Adapters

    return Adapters()


def side(**settings: Any) -> SchedulerSide:
    from kvortex.connector.geometry import Geometry
    from kvortex.connector.scheduler_side import SchedulerSide

    geometry = Geometry(("a",), (Reach(), Reach()), 4096, 16, 1 << 20, 1)
    return SchedulerSide(KVortexConfig(ram_pool_gb=0.1, **settings), geometry)


def keys(keeper: SchedulerSide, lora: Any = None) -> list[bytes]:
    asked: Any = SimpleNamespace(
        request_id="r", block_hashes=HASHES, kv_transfer_params=None, lora_request=lora
    )
    return keeper._tracked.of(asked).keys(1, 0, 4)


def with_disk() -> SchedulerSide:
    return side(disk_path="/nowhere", disk_pool_gb=1.0)


def test_keys_tell_the_weights_behind_a_name_apart(tmp_path: Path) -> None:
    before = keys(with_disk(), adapter(tmp_path / "a"))
    assert keys(with_disk(), named(tmp_path / "a")) == before
    after = keys(with_disk(), adapter(tmp_path / "a", b"trained"))
    model = keys(with_disk())
    assert len({*before, *after, *model}) == 12
    file = tmp_path / "a" / "adapter_model.safetensors"
    times = file.stat()
    file.write_bytes(b"retouch")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # one that hides that it was changed
    assert keys(with_disk(), named(tmp_path / "a"))[0] not in after


def test_in_one_life_an_adapter_is_what_it_was_when_it_was_loaded(tmp_path: Path) -> None:
    adapters = new()
    first = adapters.mark(adapter(tmp_path / "a"))
    assert adapters.mark(adapter(tmp_path / "a", b"trained")) == first
    anew = adapters.mark(named(tmp_path / "a", load_inplace=True))
    assert anew != first
    assert adapters.mark(named(tmp_path / "a")) == anew
    assert adapters.mark(named(tmp_path / "a", lora_int_id=2)) == anew
    assert len(anew) % 4


def test_an_adapter_that_is_not_to_be_seen_is_nobody_elses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (tmp_path / "gone", "some/name", tmp_path):
        adapters = new()
        assert adapters.mark(named(path)) == adapters.mark(named(path))
        assert new().mark(named(path)) != adapters.mark(named(path))
    assert "will not be found after a restart" in caplog.text


def test_without_a_disk_keys_are_those_of_vllm(tmp_path: Path) -> None:
    assert keys(side(), adapter(tmp_path / "a")) == keys(side()) == keys(with_disk())


def test_routers_are_told_of_vllms_own_hashes(tmp_path: Path) -> None:
    keeper = with_disk()
    events = keeper.tell_events()
    keeper.offload.tier.commit(keeper.offload.tier.reserve(keys(keeper, adapter(tmp_path / "a"))))
    (stored,) = events.take()
    plain = side()
    events = plain.tell_events()
    plain.offload.tier.commit(plain.offload.tier.reserve(keys(plain)))
    (expected,) = events.take()
    assert stored == expected


@pytest.mark.parametrize("length", [8, 16, 32])
def test_what_has_no_mark_stays(length: int) -> None:
    from kvortex.connector.adapters import MARK_BYTES, unmarked

    assert unmarked(bytes(length)) == bytes(length)
    assert unmarked(bytes(length) + b"m" * MARK_BYTES) == bytes(length)
