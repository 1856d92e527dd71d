"""KVortexConfig: what is refused, how the refusal reads, and the way through vLLM's JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvortex
from kvortex import ConfigError, KVortexConfig
from kvortex.config import FROM_ELSEWHERE

REFUSED: list[tuple[str, Any, str]] = [
    ("ram_pool_gb", 0, "greater than 0"),
    ("ram_pool_gb", -1.5, "greater than 0"),
    ("ram_pool_gb", 65537, "less than or equal to 65536"),
    ("ram_pool_gb", float("nan"), "finite number"),
    ("ram_pool_gb", float("inf"), "finite number"),
    ("ram_pool_gb", "many", "valid number"),
    ("ram_pool_gb", None, "valid number"),
    ("ram_pool_gb", True, "should be a number (more than 0, at most 65536; default 8.0)"),
    ("num_cuda_streams", True, "should be a number (at least 1, at most 32; default 4)"),
    ("num_cuda_streams", 0, "greater than or equal to 1"),
    ("num_cuda_streams", 33, "less than or equal to 32"),
    ("num_cuda_streams", 1.5, "valid integer"),
    ("numa_node", -1, "greater than or equal to 0 (at least 0; default None)"),
    ("numa_node", 0.5, "valid integer"),
    ("numa_node", True, "should be a number"),
    ("disk_pool_gb", True, "should be a number (more than 0, at most 1048576; default None)"),
    ("disk_pool_gb", 0, "greater than 0"),
    ("disk_max_write_mb_s", -1, "greater than 0"),
    ("disk_read_deadline_ms", 0, "greater than or equal to 1"),
    ("disk_path", "", "at least 1 character"),
    ("eviction_policy", "", "at least 1 character"),
    ("eviction_policy", 7, "valid string"),
    ("eviction_policy", ["two\nlines"], "valid string"),
]


@pytest.mark.parametrize(("key", "value", "what_would_do"), REFUSED)
def test_refusal_in_one_line(key: str, value: object, what_would_do: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KVortexConfig(**{key: value})
    message = str(caught.value)
    assert message.startswith(f"{key}={value!r}: ")
    assert what_would_do in message
    assert message.endswith(f"default {KVortexConfig.model_fields[key].default!r})")
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)


def test_unknown_setting_names_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        KVortexConfig(ram_pool_gib=3)
    assert str(caught.value) == (
        "unknown setting ram_pool_gib=3: the settings are "
        "ram_pool_gb, num_cuda_streams, numa_node, eviction_policy, admission, load, "
        "min_load_tokens, verify, trace_path, disk_path, disk_pool_gb, disk_max_write_mb_s, "
        "disk_read_deadline_ms"
    )


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("cpu_bytes_to_use", 8 << 30, "write ram_pool_gb=8"),
        ("cpu_bytes_to_use", 10**10, "write ram_pool_gb=9.31323"),
        ("cpu_bytes_to_use", "8GB", "write ram_pool_gb=<GiB>"),
        ("cpu_bytes_to_use_per_rank", 1 << 29, "write ram_pool_gb=0.5 times the number of ranks"),
        ("store_threshold", 2, 'write admission="second_sight" for 2 and more, else "always"'),
        ("block_size", 48, "leave it out, KVortex moves vLLM's own blocks"),
        ("max_local_cpu_size", 5.0, "write ram_pool_gb=5.0 times the number of ranks"),
        ("lmcache.max_local_cpu_size", 5, "write ram_pool_gb=5 times the number of ranks"),
        ("max_local_cpu_size", "5\n", r"write ram_pool_gb='5\n' times the number of ranks"),
        ("local_cpu", True, "leave it out, host memory is always used"),
    ],
)
def test_settings_of_other_connectors_are_translated(key: str, value: object, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KVortexConfig.from_extra_config({key: value})
    assert str(caught.value).endswith(f"={value!r}: {hint}")
    assert str(caught.value).startswith("unknown setting ")


@pytest.mark.parametrize("value", [10**400, -1, 0, float("nan"), 1 << 60])
def test_a_size_that_no_pool_has_is_not_translated(value: float) -> None:
    with pytest.raises(ConfigError, match=r"write ram_pool_gb=<GiB>$"):
        KVortexConfig.from_extra_config({"cpu_bytes_to_use": value})


@pytest.mark.parametrize(
    ("name", "reason"), [("a\0b", "the name of a file"), ("\ud800", "a valid string")]
)
@pytest.mark.parametrize("key", ["trace_path", "disk_path"])
def test_what_cannot_be_a_files_name_is_refused(key: str, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}=.*: input should be {reason}"):
        KVortexConfig(**{"disk_pool_gb": 1, "disk_path": "/d", key: name})


def test_a_value_is_shown_short() -> None:
    with pytest.raises(ConfigError) as caught:
        KVortexConfig.from_extra_config({"ram_pool_gb": "9" * 1_000_000})
    assert len(str(caught.value)) < 300


def test_every_translation_leads_to_a_setting() -> None:
    settings = KVortexConfig.model_fields
    for key, hint in FROM_ELSEWHERE.items():
        assert key not in settings
        verb, what = hint.split(maxsplit=1)
        assert verb == "leave" or (verb == "write" and what.split("=")[0] in settings)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ram_pool_gb", 65536),
        ("ram_pool_gb", 1e-9),
        ("num_cuda_streams", 1),
        ("num_cuda_streams", 32),
    ],
)
def test_limits_are_allowed(key: str, value: float) -> None:
    assert getattr(KVortexConfig(**{key: value}), key) == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"disk_path": "/d"}, "disk_path='/d': how much of it may be used? set disk_pool_gb too"),
        ({"disk_pool_gb": 9}, "disk_pool_gb=9.0: where? set disk_path too"),
        ({"disk_max_write_mb_s": 5}, "disk_max_write_mb_s=5.0: where? set disk_path too"),
        ({"disk_read_deadline_ms": 5}, "disk_read_deadline_ms=5: where? set disk_path too"),
    ],
)
def test_settings_of_the_disk_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KVortexConfig(**settings)
    assert str(caught.value) == message
    whole = {"disk_path": "/d", "disk_pool_gb": 9.0} | settings
    assert KVortexConfig(**whole).disk_path == "/d"


def test_frozen() -> None:
    config = KVortexConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.ram_pool_gb = 3.0
    assert config.ram_pool_gb == 8.0


def test_ram_pool_bytes() -> None:
    assert KVortexConfig(ram_pool_gb=1.5).ram_pool_bytes == 3 << 29
    assert isinstance(KVortexConfig().ram_pool_bytes, int)


def test_what_vllm_is_told() -> None:
    assert KVortexConfig(ram_pool_gb=2).kv_transfer_config() == {
        "kv_connector": "KVortexConnector",
        "kv_connector_module_path": "kvortex.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "ram_pool_gb": 2.0,
            "num_cuda_streams": 4,
            "numa_node": None,
            "eviction_policy": "lru_freq",
            "admission": "adaptive",
            "load": "auto",
            "min_load_tokens": 0,
            "verify": "always",
            "trace_path": None,
            "disk_path": None,
            "disk_pool_gb": None,
            "disk_max_write_mb_s": None,
            "disk_read_deadline_ms": 1000,
        },
    }


@pytest.mark.fuzz
@given(
    ram=st.floats(1e-9, 65536), streams=st.integers(1, 32), policy=st.text(min_size=1, max_size=9)
)
def test_through_json_and_back(ram: float, streams: int, policy: str) -> None:
    config = KVortexConfig(ram_pool_gb=ram, num_cuda_streams=streams, eviction_policy=policy)
    told = json.loads(json.dumps(config.kv_transfer_config()))
    assert KVortexConfig.from_extra_config(told["kv_connector_extra_config"]) == config


@pytest.mark.parametrize("extra", [None, {}])
def test_no_extra_config_means_defaults(extra: dict[str, Any] | None) -> None:
    assert KVortexConfig.from_extra_config(extra) == KVortexConfig()


def test_extra_config_is_checked() -> None:
    with pytest.raises(ConfigError, match="unknown setting ram=3"):
        KVortexConfig.from_extra_config({"ram": 3})


@pytest.mark.parametrize("key", ["self", 3, "two\nlines"])
def test_any_unknown_key_is_refused_in_one_line(key: object) -> None:
    with pytest.raises(ConfigError) as caught:
        KVortexConfig.from_extra_config({key: 1})  # type: ignore[dict-item]
    message = str(caught.value)
    assert message.startswith("unknown setting ")
    assert "\n" not in message


def test_public_names_exist() -> None:
    for name in kvortex.__all__:
        assert getattr(kvortex, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kvortex.nothing
