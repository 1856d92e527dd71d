"""Whatever a file, an option or a server says: a right value, or one line that says why not."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from budget import budget
from disks import KINDS, opened, verified_by, written
from hypothesis import example, given
from hypothesis import strategies as st
from junk import VALUES, WORDS, is_one_line, packed, perhaps_refused, spoiled, spoiled_bytes

from kvortex import calibration
from kvortex.calibration import DMA, STAGED, ZERO_COPY, load_calibration, load_speeds
from kvortex.cli import main
from kvortex.config import KVortexConfig, slots_in_pool
from kvortex.core import Direction
from kvortex.disk.opening import disk_slots_in_pool
from kvortex.plugins import load_admission, load_policy
from kvortex.scrape import Scrape
from kvortex.simulator import replay
from kvortex.top import View
from kvortex.trace import read_trace

if TYPE_CHECKING:
    from pathlib import Path

    from kvortex.trace import Trace

pytestmark = pytest.mark.fuzz

Capture = pytest.CaptureFixture[str]

SETTINGS = KVortexConfig(
    trace_path="trace.gz", disk_path="/disk", disk_pool_gb=20, disk_max_write_mb_s=100
).model_dump()
FOREIGN = {"cpu_bytes_to_use": 1 << 34, "lmcache.chunk_size": 256, "max_local_cpu_size": 5}


def said(arguments: list[str], capsys: Capture) -> str | None:
    """What a command printed; None where it refused, in one line."""
    code = main(arguments)
    shown = capsys.readouterr()
    if code == 0:
        shown.out.encode()  # or it could not be printed
        return shown.out
    assert shown.out == ""
    assert shown.err.startswith("kvortex: ")
    assert is_one_line(shown.err.removesuffix("\n")), shown.err
    return None


@given(extra=spoiled(SETTINGS) | spoiled(SETTINGS | FOREIGN) | st.dictionaries(WORDS, VALUES))
@example(extra={"\ud800": None})
def test_the_connectors_settings(extra: dict[str, Any]) -> None:
    with perhaps_refused():
        config = KVortexConfig.from_extra_config(json.loads(packed(extra)))
        told = json.loads(packed(config.kv_transfer_config()))
        assert KVortexConfig.from_extra_config(told["kv_connector_extra_config"]) == config
        for path in (config.trace_path, config.disk_path):
            assert b"\0" not in os.fsencode(path or "")
        load_policy(config.eviction_policy, capacity=1)
        load_admission(config.admission, capacity=1)
        assert slots_in_pool(config, 4096, num_ranks=2) >= 1
        assert config.disk_pool_gb is None or disk_slots_in_pool(config.disk_pool_gb, 4096) >= 1


# No argument has a zero byte; what is not UTF-8 in one comes as a lone surrogate.
ARGUMENTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    | st.sampled_from(["\udcff", "\n", "9", ".", "-", "%"]),
    max_size=12,
) | st.sampled_from(["0", "7", "0.5", "1e999", "nan", "-1", "9" * 400, "5%", "64MiB", "1e99GB"])
OPTIONS = st.sampled_from(["--" + name.replace("_", "-") for name in SETTINGS])


@given(options=st.dictionaries(OPTIONS, ARGUMENTS | st.sampled_from(["lru", "always", "auto"])))
def test_kvortex_config(options: dict[str, str], capsys: Capture) -> None:
    shown = said(["config", *(f"{name}={value}" for name, value in options.items())], capsys)
    if shown is not None:
        told = json.loads(shown)["kv_connector_extra_config"]
        assert KVortexConfig(**told).model_dump() == told


GPU = torch.device("cuda", 0)
CHOICE = {
    "small": ZERO_COPY,
    "large": DMA,
    "from_bytes": 1 << 20,
    "busy_from_bytes": 0,
    "programs": 8,
}
CALIBRATED = {
    "gpu 0": {
        "4096": {"store": CHOICE, "load": CHOICE},
        "65536": {"store": CHOICE, "load": CHOICE},
    },
    calibration.SPEEDS: {"gpu 0": {"store": 50.5, "load": 51}},
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One with a GPU; its calibration file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "machine_key", lambda device: f"gpu {device.index}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path = calibration.calibration_file()
    path.parent.mkdir()
    return path


@given(
    told=spoiled(CALIBRATED).map(packed)
    | VALUES.map(packed)
    | spoiled_bytes(packed(CALIBRATED))
    | st.binary()
)
def test_a_calibration_file(told: bytes, machine: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    machine.write_bytes(told)
    found = load_calibration(GPU)
    for choice in found.for_page(3 << 12).values():
        for nbytes in (0, 1 << 62):
            assert choice.mover(nbytes, busy=bool(nbytes)) in {ZERO_COPY, STAGED, DMA}
        assert 1 <= choice.programs <= 1024
    speeds = load_speeds()
    assert speeds is None or all(0 < speed < math.inf for speed in speeds.values())
    assert all(is_one_line(record.getMessage()) for record in caplog.records)
    calibration.save_calibration(GPU, calibration.defaults(), dict.fromkeys(Direction, 50.0))
    assert load_calibration(GPU).choices == calibration.defaults().choices
    assert load_speeds() == dict.fromkeys(Direction, 50.0)


HEADER = {"format": "kvortex-trace-1", "block_tokens": 16, "block_bytes": 4096}
REQUESTS = [
    {"timestamp": 20 * n, "input_length": 40, "hash_ids": [0, n % 2, 7 + n], "hits": {"host": n}}
    for n in range(4)
]


@st.composite
def traces(draw: st.DrawFn) -> bytes:
    """Plain or compressed, with mistakes in some lines, or some bytes."""
    header = [draw(spoiled(HEADER))] if draw(st.booleans()) else []
    lines = [json.dumps(line) for line in [*header, *draw(spoiled(REQUESTS))]]
    text = "\n".join(lines).encode() + b"\n" * draw(st.integers(0, 1))
    told = gzip.compress(text, mtime=0) if draw(st.booleans()) else text
    return draw(spoiled_bytes(told)) if draw(st.booleans()) else told


@given(told=traces() | st.binary())
def test_a_trace(told: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(told)
    with perhaps_refused():
        check_trace(read_trace(path))


def check_trace(trace: Trace) -> None:
    facts = trace.facts()
    json.dumps(facts, allow_nan=False)
    assert facts["blocks"] >= facts["distinct_blocks"] >= 1
    outcome = replay(trace, "lru", 2, "always", 1)
    assert 0 <= outcome.block_hit_rate <= 1
    json.dumps(outcome.as_dict(), allow_nan=False)


@given(
    capacity=ARGUMENTS, disk=st.none() | ARGUMENTS, block=st.none() | ARGUMENTS, policy=ARGUMENTS
)
def test_kvortex_simulate_refuses(
    capacity: str, disk: str | None, block: str | None, policy: str, tmp_path: Path, capsys: Capture
) -> None:
    """The policy's name comes last and is none, so that nothing is simulated."""
    path = tmp_path / "trace"
    path.write_bytes(b"\n".join(map(packed, REQUESTS)))
    options = {"--capacity": capacity, "--disk": disk, "--block-bytes": block, "--policy": policy}
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    assert said(["simulate", str(path), *given], capsys) is None


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "dtype": "bfloat16",
    "quantization_config": {"kv_cache_scheme": {"num_bits": 8}},
}
WINDOWED = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}
LATENT = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
OLDER = {
    "architectures": ["MPTForCausalLM"],
    "model_type": "mpt",
    "n_layers": 2,
    "d_model": 64,
    "n_heads": 4,
    "attn_config": {"kv_n_heads": 2},
}
MODELS = st.one_of(*(spoiled(model) for model in (LLAMA, WINDOWED, LATENT, OLDER)))


@given(told=MODELS.map(packed) | VALUES.map(packed) | spoiled_bytes(packed(LLAMA)) | st.binary())
def test_a_models_config(told: bytes, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(told)
    command = ["plan", str(path), "--gpu-memory", "1", "--ram-pool-gb", "2", "--disk-pool-gb", "9"]
    shown = said(command, capsys)
    as_json = said([*command, "--json"], capsys)
    assert (shown is None) is (as_json is None)
    if shown is not None and as_json is not None:
        assert all(line.isprintable() for line in shown.splitlines())
        plan = json.loads(as_json)
        json.dumps(plan, allow_nan=False)
        assert plan["bytes_per_token"] > 0
        assert plan["host_blocks"] * plan["block_bytes_per_gpu"] <= 2 << 30


PLANNED = st.sampled_from(["--gpu-memory", "--ram-pool-gb", "--disk-pool-gb", "--disk-path"])
COUNTED = st.sampled_from(["--tp", "--block-size", "--link-gb-s"])


@given(
    options=st.dictionaries(PLANNED, ARGUMENTS)
    | st.dictionaries(PLANNED | COUNTED, st.floats().map(str) | st.integers().map(str))
)
@example(options={"--tp": "1" + 400 * "0"})
@example(options={"--block-size": "1" + 400 * "0"})
def test_kvortex_plan(options: dict[str, str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_bytes(packed(LLAMA))
    given = [f"{name}={value}" for name, value in options.items()]
    try:
        shown = said(["plan", str(tmp_path), "--json", *given], capsys)
    except SystemExit:
        assert "kvortex plan: argument --" in capsys.readouterr().err
    else:
        assert shown is None or json.loads(shown)["host_tokens"] >= 0


METRICS = b"""
# HELP vllm:kvortex_hit_tokens_total KVortex: hit tokens since start.
vllm:kvortex_hit_tokens_total{engine="0",model_name="a, \\"b\\" {c}"} 600.0
vllm:kvortex_prefill_tokens_per_second{engine="0",model_name="a, \\"b\\" {c}"} 1.5e+02
vllm:kvortex_missed_tokens_total{engine="0",reason="late"} 32 1700000000000
vllm:prefix_cache_queries_total 700
vllm:kvortex_slots 8
vllm:kvortex_resident_slots .5
"""


@given(
    before=spoiled_bytes(METRICS) | st.binary(),
    after=spoiled_bytes(METRICS) | st.text().map(lambda text: text.encode("utf-8", "replace")),
)
def test_metrics_on_the_screen(before: bytes, after: bytes) -> None:
    first, then = (Scrape.of(told.decode("utf-8", "replace"), 1) for told in (before, after))
    for view in (View.of(first), View.of(then, first)):
        json.dumps(view.as_dict(), allow_nan=False)
        assert all(line.isprintable() for line in view.lines())


@given(
    samples=st.dictionaries(
        st.text(st.characters(codec="utf-8")),
        st.floats(0, 1e100).filter(lambda number: number == 0 or number > 1e-100),
    )
)
def test_metrics_as_prometheus_writes_them(samples: dict[str, float]) -> None:
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    gauge = client.Gauge("vllm:kvortex_x", "help", ["reason"], registry=registry)
    for reason, number in samples.items():
        gauge.labels(reason).set(number)
    read = Scrape.of(client.generate_latest(registry).decode(), 0)
    found = read.samples.get("vllm:kvortex_x", {}).values()
    assert sorted(found) == sorted(samples.values())


@pytest.fixture(scope="module", params=KINDS)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk_path with one cache of two blocks."""
    path, how = tmp_path_factory.mktemp("disk"), verified_by(request.param)
    with opened(path, verification=how) as (store, pool):
        assert not written(store, pool, {b"a": 0, b"b": 3}, verification=how)
    return path


OTHERWISE = st.sampled_from(["gone", "a folder", "a link", "a pipe", "kept", "kept", "kept"])


@budget(25)
@given(data=st.data())
def test_a_cache_on_disk(data: st.DataObject, cache: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "disk"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(cache, path)
    (folder,) = path.glob("*/rank-0")
    about = json.loads((folder / "namespace.json").read_bytes())
    spoil(folder / "namespace.json", data.draw(spoiled(about).map(packed) | st.binary()), data)
    spoil(folder / "records", data.draw(spoiled_bytes((folder / "records").read_bytes())), data)
    slots = (folder / "slots").read_bytes()
    spoil(folder / "slots", slots[data.draw(st.integers(0, 99)) :], data)
    looked(path, capsys)
    said(["disk", "clear", "--yes", str(path)], capsys)


def looked(path: Path, capsys: Capture) -> None:
    """What inspect and verify tell agrees with what they end with, and each trouble has a line."""
    bad = ("corrupt", "not_verifiable", "unread", "changed", "damaged_records")
    for command in ("inspect", "verify"):
        assert main(["disk", command, str(path)]) in {0, 1}
        capsys.readouterr().out.encode()
        code = main(["disk", command, str(path), "--json"])
        shown = capsys.readouterr()
        found = json.loads(shown.out)
        lines = shown.err.split("\n")[:-1]
        assert len(lines) == len(found["unreadable"])
        assert all(line.startswith("kvortex: ") and is_one_line(line) for line in lines)
        wrong = any(found.get(name) for name in bad)
        damaged = any(cache["damaged"] for cache in found.get("caches", []) if not cache["in_use"])
        assert code == (wrong or damaged or bool(lines))


def spoil(file: Path, told: bytes, data: st.DataObject) -> None:
    """Put something else in the place of a file, or other bytes into it."""
    kind = data.draw(OTHERWISE)
    if kind == "kept":
        file.write_bytes(told)
        return
    file.unlink()
    if kind == "a folder":
        file.mkdir()
    elif kind == "a link":
        file.symlink_to("/etc/passwd")
    elif kind == "a pipe":
        os.mkfifo(file)
