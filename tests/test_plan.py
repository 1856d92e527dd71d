"""`kvortex plan`: right to the byte against a real vLLM, and plain where it cannot be."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import models
import pytest
from engines import running

from kvortex.cli import main
from kvortex.config import KVortexConfig
from kvortex.core import ConfigError
from kvortex.planning.attention import attention_of
from kvortex.planning.hf_config import CLASS_DEFAULTS, read_hf_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GIB = 1 << 30
GPU_BYTES = 64 << 20
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}


def written(folder: Path, **settings: Any) -> str:
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What `kvortex plan --json` prints."""
    assert main(["plan", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def windowed(folder: Path) -> None:
    """Every layer looks through the same window: one group."""
    written(
        folder,
        **models.COMMON,
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=models.WINDOW,
    )


def uneven_hybrid(folder: Path) -> None:
    """5 layers with a window and 2 without: groups of 2 layers, one of which is padded."""
    written(
        folder,
        **models.COMMON | {"num_hidden_layers": 7},
        architectures=["Gemma3ForCausalLM"],
        model_type="gemma3_text",
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=models.WINDOW,
        sliding_window_pattern=3,
        layer_types=None,
    )


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "kv_dtype", "groups"),
    [
        pytest.param(models.llama, "float32", 1, id="GQA"),
        pytest.param(models.llama, "fp8", 1, id="fp8", marks=models.NO_FP8),
        pytest.param(models.mla, "float32", 1, id="MLA"),
        pytest.param(windowed, "bfloat16", 1, id="MQA, window"),
        pytest.param(models.window_hybrid, "float32", 2, id="hybrid"),
        pytest.param(uneven_hybrid, "bfloat16", 4, id="uneven hybrid"),
    ],
)
def test_bytes_are_those_that_vllm_allocates(
    make: Callable[[Path], None],
    kv_dtype: str,
    groups: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("vllm")
    make(tmp_path)
    settings: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True}
    settings |= {"kv_cache_dtype": "fp8"} if kv_dtype == "fp8" else {"dtype": kv_dtype}
    with running(str(tmp_path), None, **settings, kv_cache_memory_bytes=GPU_BYTES) as llm:
        core = llm.llm_engine.engine_core.engine_core
        cache = core.scheduler.kv_cache_config
        tensors = core.model_executor.driver_worker.worker.model_runner.kv_caches
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
        allocated = sum(storage.nbytes() for storage in storages.values())
        num_groups, num_blocks = len(cache.kv_cache_groups), cache.num_blocks
        (size,) = {group.kv_cache_spec.block_size for group in cache.kv_cache_groups}
    capsys.readouterr()  # vLLM's log
    told = ["--gpu-memory", str(GPU_BYTES / GIB), "--block-size", str(size), "--kv-dtype", kv_dtype]
    plan = planned(capsys, str(tmp_path), *told)
    assert len(plan["groups"]) == num_groups == groups
    assert plan["gpu_blocks"] == num_blocks
    assert plan["block_bytes_per_gpu"] * num_blocks == allocated
    assert plan["bytes_per_token"] * size * num_blocks == allocated * num_groups
    assert plan["gpu_tokens"] == num_blocks // num_groups * size


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8, 16, 32])
def test_heads_are_spread_and_repeated_as_by_vllm(tensor_parallel: int, tmp_path: Path) -> None:
    vllm = pytest.importorskip("vllm.config")
    model = written(tmp_path, **LLAMA, vocab_size=32, intermediate_size=32)
    parallel = vllm.ParallelConfig()
    parallel.tensor_parallel_size = tensor_parallel
    config = vllm.ModelConfig(model=model, skip_tokenizer_init=True)
    expected = config.get_num_kv_heads(parallel) * config.get_head_size() * 2 * 2
    assert attention_of(read_hf_config(tmp_path)).bytes_per_token(tensor_parallel) == expected


def test_the_plan_of_a_known_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 3.1 8B takes 128 KiB a token: 32 layers, 8 heads of 128, keys and values, 2 bytes."""
    told = ["--gpu-memory", "16", "--ram-pool-gb", "64", "--disk-pool-gb", "256"]
    told += ["--disk-path", "/mnt/kv", "--link-gb-s", "50"]
    plan = planned(capsys, written(tmp_path, **LLAMA), *told)
    assert plan["bytes_per_token"] == 128 << 10
    assert plan["gpu_tokens"] == 16 * GIB // (128 << 10)
    assert plan["host_tokens"] == 64 * GIB // (128 << 10)
    assert plan["disk_tokens"] == 256 * GIB // (128 << 10)
    assert plan["effective_tokens"] == plan["disk_tokens"]  # which has what the host has, too
    assert plan["effective_times"] == 256 / 16
    assert plan["notes"] == []
    assert [row["tokens"] for row in plan["restore"]] == [8192, 32768, 131072]
    assert plan["restore"][0]["seconds"] == pytest.approx(8192 * (128 << 10) / 50e9)
    config = KVortexConfig(ram_pool_gb=64, disk_pool_gb=256, disk_path="/mnt/kv")
    assert plan["kv_transfer_config"] == config.kv_transfer_config()


def test_the_table_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(tmp_path, **LLAMA)
    assert main(["plan", model, "--gpu-memory", "16", "--ram-pool-gb", "64"]) == 0
    shown = capsys.readouterr().out
    assert "a token takes 128 KiB" in shown
    assert "131,072" in shown
    assert "524,288 tokens, 4 x the GPU's" in shown
    assert "disk" not in shown.partition("restored")[0]
    config = json.dumps(KVortexConfig(ram_pool_gb=64).kv_transfer_config())
    assert f"vllm serve {model} --kv-transfer-config '{config}'" in shown


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ([], []),
        (["--tp", "2"], ["--tensor-parallel-size", "2"]),
        (["--kv-dtype", "fp8_e5m2"], ["--kv-cache-dtype", "fp8_e5m2"]),
        (["--kv-dtype", "float32"], ["--dtype", "float32"]),
        (["--kv-dtype", "auto", "--block-size", "16"], ["--block-size", "16"]),
    ],
)
@pytest.mark.parametrize("named", [".", "config.json"])
def test_the_command_serves_what_was_planned(
    told: list[str],
    words: list[str],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written(tmp_path, **LLAMA)
    assert main(["plan", str(tmp_path / named), *told]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:-2] == ["vllm", "serve", str(tmp_path), *words]
    assert command[-2] == "--kv-transfer-config"


def test_a_pool_smaller_than_the_gpus_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, written(tmp_path, **LLAMA), "--gpu-memory", "16")
    assert plan["effective_times"] == 1
    assert any("--ram-pool-gb 32 would hold twice as much" in note for note in plan["notes"])


@pytest.mark.parametrize(
    ("settings", "memory", "row"),
    [
        ({}, 1e-3, ["GPU", "0", "0"]),
        (
            {"layer_types": ["sliding_attention", "full_attention"] * 16, "sliding_window": 64},
            1.5e-3,
            ["GPU", "1", "0"],
        ),
    ],
)
def test_gpus_that_hold_no_block_are_told(
    settings: dict[str, Any],
    memory: float,
    row: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", written(tmp_path, **LLAMA | settings), "--gpu-memory", str(memory)]) == 0
    shown = capsys.readouterr().out
    assert row in [line.split() for line in shown.splitlines()]
    assert "--gpu-memory holds no block" in shown
    assert "for comparison" not in shown


def test_a_disk_no_larger_than_host_memory_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--gpu-memory", "16", "--ram-pool-gb", "12", "--disk-pool-gb", "12"]
    plan = planned(capsys, written(tmp_path, **LLAMA), *told)
    assert plan["effective_times"] == 1
    pools, disk = plan["notes"]
    assert "no more than the GPU does" in pools
    assert "serves after a restart only" in disk


HALF_WINDOWED = LLAMA | {
    "layer_types": ["sliding_attention", "full_attention"] * 16,
    "sliding_window": 1024,
}


def test_a_window_bounds_what_a_sequence_keeps_and_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, written(tmp_path, **HALF_WINDOWED), "--gpu-memory", "16")
    whole, window = 32768 // 16, 1024 // 16
    assert plan["gpu_tokens"] == plan["gpu_blocks"] // 2 * 16
    kept = (1023 + 2 * 8192 + 15) // 16 + 1
    assert plan["gpu_longest_sequence"] == (plan["gpu_blocks"] - 1 - kept) * 16
    assert plan["groups"] == [{"window": 1024}, {"window": None}]
    assert plan["restore"][1]["bytes_per_gpu"] == (whole + window) * plan["block_bytes_per_gpu"]
    assert any("1024 tokens only" in note and "64 MiB" in note for note in plan["notes"])


def test_a_sequence_shorter_than_a_batch_is_kept_whole_in_every_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, written(tmp_path, **HALF_WINDOWED), "--gpu-memory", "1")
    assert plan["gpu_blocks"] == 1024
    assert plan["gpu_longest_sequence"] == (1024 - 2) // 2 * 16  # vLLM's own, and a window's end


def test_the_text_model_of_a_multimodal_one_counts(tmp_path: Path) -> None:
    nested = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    written(tmp_path, **nested)
    found = attention_of(read_hf_config(tmp_path))
    assert (found.kv_heads, found.head_elements, found.windows.count(None)) == (4, 512, 4)


def test_groups_of_heads_count_as_kv_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step3 = {"model_type": "step3_text", "num_hidden_layers": 61, "num_attention_heads": 64}
    model = written(tmp_path, **step3, num_attention_groups=1, head_dim=256)
    plan = planned(capsys, model, "--gpu-memory", "1")
    assert plan["bytes_per_token"] == 61 * 2 * 256 * 2
    assert plan["notes"] == []


@pytest.mark.parametrize(
    "windows", [(64, 64, 64, None, 64, 64, 64, None), (64, 64, 64, None, 64, None)]
)
def test_a_pattern_of_letters_is_read_as_its_vendor_does(
    windows: tuple[int | None, ...], tmp_path: Path
) -> None:
    """Of EXAONE 4: every so-many-th layer looks at everything, and the last one."""
    letters = {"model_type": "exaone4", "sliding_window": 64, "sliding_window_pattern": "LLLG"}
    written(tmp_path, **LLAMA | letters | {"num_hidden_layers": len(windows)})
    assert attention_of(read_hf_config(tmp_path)).windows == windows


def test_layers_listed_as_attention_are_attention(tmp_path: Path) -> None:
    """As of MiniMax-M2, whose older siblings list layers of another kind, too."""
    written(tmp_path, **LLAMA | {"model_type": "minimax_m2", "attn_type_list": [1] * 32})
    assert attention_of(read_hf_config(tmp_path)).windows == (None,) * 32


def test_it_is_told_where_every_head_is_taken_for_a_kv_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, written(tmp_path, **LLAMA | {"num_key_value_heads": None}))
    assert plan["bytes_per_token"] == 4 * (128 << 10)
    (note,) = plan["notes"]
    assert "No known key tells its KV heads: each of 32 heads counts as one" in note


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dtype": "float32"}, "bfloat16"),  # vLLM halves it
        ({"dtype": None, "torch_dtype": "float16"}, "float16"),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}}, "fp8"),
        (
            {
                "quantization_config": {
                    "quant_method": "modelopt",
                    "quantization": {"kv_cache_quant_algo": "FP8"},
                }
            },
            "fp8",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "bfloat16"),
    ],
)
def test_the_checkpoint_says_how_wide_an_element_is(
    settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    written(tmp_path, **LLAMA | settings)
    assert attention_of(read_hf_config(tmp_path)).dtype == expected


@pytest.mark.parametrize("model_type", sorted(CLASS_DEFAULTS))
def test_what_a_config_leaves_out_is_as_in_transformers(model_type: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    written(tmp_path, model_type=model_type)
    found = attention_of(read_hf_config(tmp_path))
    theirs = transformers.CONFIG_MAPPING[model_type]()
    head = theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads
    kinds = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    assert len(found.windows) == theirs.num_hidden_layers
    assert found.kv_heads == theirs.num_key_value_heads
    assert found.head_elements == 2 * head
    assert list(found.windows) == (
        [window if kind == "sliding_attention" else None for kind in kinds]
        if kinds
        else [window] * theirs.num_hidden_layers
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "qwen3", "sliding_window": 64, "use_sliding_window": False},
        {"model_type": "qwen3", "sliding_window": 64},
        {"model_type": "qwen3", "sliding_window": 64, "use_sliding_window": True},
        {
            "model_type": "qwen3",
            "sliding_window": 64,
            "use_sliding_window": True,
            "max_window_layers": 10,
        },
        {"model_type": "cohere2", "sliding_window": 64},
        {"model_type": "olmo3", "sliding_window": 64},
        {"model_type": "gemma3_text", "sliding_window": 64, "sliding_window_pattern": 4},
    ],
)
def test_layers_have_windows_where_transformers_gives_them(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    written(tmp_path, **LLAMA | settings)
    kinds = transformers.AutoConfig.from_pretrained(tmp_path).layer_types
    expected = [64 if kind == "sliding_attention" else None for kind in kinds]
    assert list(attention_of(read_hf_config(tmp_path)).windows) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "mamba2", "state_size": 128}, ["not attention", "stays off"]),
        (LLAMA | {"layer_types": ["linear_attention"] * 32}, ["linear_attention", "stays off"]),
        (LLAMA | {"attn_type_list": [0] * 7 + [1]}, ["attn_type_list", "stays off"]),
        (LLAMA | {"attn_type_list": 1}, ["attn_type_list", "stays off"]),
        (LLAMA | {"model_type": "gemma4_text", "global_head_dim": 512}, ["global_head_dim"]),
        (LLAMA | {"kv_lora_rank": 512}, ["latent cache"]),
        (LLAMA | {"architectures": ["BertModel"]}, ["BertModel"]),
        ({"model_type": "novel"}, ["num_attention_heads", "'novel'"]),
        ({}, ["num_attention_heads", "no model_type"]),
        (LLAMA | {"num_hidden_layers": 10**9}, ["num_hidden_layers=1000000000"]),
        (LLAMA | {"num_hidden_layers": 10**5}, ["100000 layers"]),
        (
            LLAMA | {"sliding_window": 64, "sliding_window_pattern": "LX"},
            ["sliding_window_pattern='LX'"],
        ),
        (LLAMA | {"num_key_value_heads": 0.5}, ["num_key_value_heads=0.5"]),
        (LLAMA | {"num_key_value_heads": -1}, ["num_key_value_heads=-1"]),
        (LLAMA | {"num_key_value_heads": 7}, ["7 KV heads"]),
        (LLAMA | {"hidden_size": 4097}, ["hidden_size=4097"]),
        (LLAMA | {"attn_config": {"kv_n_heads": 10**400}}, ["kv_n_heads=1000", "..."]),
        (LLAMA | {"architectures": ["two\nlines"]}, [r"two\nlines is not known"]),
        (
            LLAMA | {"quantization_config": {"kv_cache_scheme": {"num_bits": "4\n"}}},
            [r"quantized as {'num_bits': '4\n'}, whose size is not known"],
        ),
        (LLAMA | {"layer_types": [["a\n"]]}, [r"not attention (['a\n'])"]),
    ],
)
def test_a_model_of_which_nothing_can_be_said_is_refused_in_a_line(
    settings: dict[str, Any],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", written(tmp_path, **settings)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert all(word in shown.err for word in words)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--tp", "0"], "--tp 0"),
        (["--tp", "3"], "--tp 3"),
        (["--tp", "1" + 400 * "0"], "--tp 1000"),
        (["--block-size", "1" + 400 * "0"], "--block-size 1000"),
        (["--gpu-memory", "nan"], "--gpu-memory"),
        (["--gpu-memory", "-1"], "--gpu-memory"),
        (["--link-gb-s", "inf"], "--link-gb-s"),
        (["--block-size", "0"], "--block-size"),
        (["--ram-pool-gb", "much"], "ram_pool_gb='much'"),
        (["--ram-pool-gb", "1e-6"], "one KV block takes"),
        (["--disk-pool-gb", "-5"], "disk_pool_gb='-5'"),
        (["--disk-path", "/mnt/kv"], "set disk_pool_gb too"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_in_a_line(
    arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", written(tmp_path, **LLAMA), *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert word in shown.err


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_configuration_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"no config\.json in this folder"):
        read_hf_config(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        read_hf_config(file)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="no JSON"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("depth", [100, 900])
def test_a_configuration_nested_without_end_is_refused(depth: int, tmp_path: Path) -> None:
    text = '{"text_config": ' * depth + json.dumps(LLAMA) + "}" * depth
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="no JSON"):
        read_hf_config(tmp_path)


def test_a_name_that_cannot_be_encoded_is_printed_in_a_way_that_a_shell_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / os.fsdecode(b"it's caf\xe9")
    folder.mkdir()
    model = written(folder, **LLAMA | {"architectures": ["\ud800\x1b[2JForCausalLM"]})
    assert main(["plan", model]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(r"\ud800\x1b[2JForCausalLM: 32 layers")
    command = shlex.split(shown.splitlines()[-1])
    assert command[:2] == ["vllm", "serve"]
    assert command[2].endswith(r"it's caf\udce9")
    assert json.loads(command[-1]) == KVortexConfig().kv_transfer_config()


def test_neither_torch_nor_vllm_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from kvortex.cli import main; "
        f"code = main(['plan', {written(tmp_path, **LLAMA)!r}]); "
        "sys.exit(code or len({'torch', 'triton', 'vllm', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
