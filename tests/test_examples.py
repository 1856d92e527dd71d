"""The examples: scripts run on a real vLLM, containers' files mean what vLLM and KVortex take.

`chat.py` runs in test_documents.py, `kvortex-clock` in test_testing.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvortex import KVortexConfig

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SMALL = {
    "enforce_eager": True,
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 2048,
    "kv_cache_memory_bytes": 64 << 20,
}
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
GIB = {"g": 1.0, "Gi": 1.0, "gb": 1.0}


def compose() -> dict[str, Any]:
    """The one service of the Compose file."""
    service: dict[str, Any] = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())["services"]
    (only,) = service.values()
    return dict(only)


def manifests() -> dict[str, dict[str, Any]]:
    """Of Kubernetes, by kind."""
    found = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    return {manifest["kind"]: manifest for manifest in found}


def test_a_chat_with_nobody_ends_in_one_line() -> None:
    pytest.importorskip("openai")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, str(EXAMPLES / "chat.py"), url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"{url}: Connection error.\n")


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = manifests()["StatefulSet"]["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return dict(only)


def environment(name: str) -> str:
    """A variable of the pod's container."""
    (value,) = (str(each["value"]) for each in container()["env"] if each["name"] == name)
    return value


def arguments(kind: str) -> list[str]:
    found: list[str] = compose()["command"] if kind == "compose" else container()["args"]
    return found


def transfer_config(kind: str) -> dict[str, Any]:
    """The value of --kv-transfer-config."""
    (text,) = (a for a in arguments(kind) if a.startswith("--kv-transfer-config="))
    told: dict[str, Any] = json.loads(text.partition("=")[2])
    return told


def gib(size: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(\w+)", size).groups()  # type: ignore[union-attr]
    return float(number) * GIB[unit]


@pytest.mark.vllm
def test_offline_restores_what_the_gpu_forgot(tiny_model: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    command = [sys.executable, str(EXAMPLES / "offline.py"), tiny_model, "--ram-pool-gb", "0.25"]
    done = subprocess.run(
        [*command, "--llm", json.dumps(SMALL)],
        cwd=tmp_path,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rounds = re.findall(r"(\d+) tokens of prompts, (\d+) from a cache", done.stdout)
    (asked, cached), (asked_again, restored) = [(int(a), int(b)) for a, b in rounds]
    assert cached == 0
    assert asked - asked_again == 4 * (len("What is it about? ") - len("Who wrote it? "))
    assert restored > 0.95 * asked_again


@pytest.mark.parametrize("kind", ["compose", "kubernetes"])
def test_connector_is_configured_as_kvortex_config_would(kind: str) -> None:
    told = transfer_config(kind)
    config = KVortexConfig.from_extra_config(told.pop("kv_connector_extra_config"))
    whole = config.kv_transfer_config()
    assert whole.pop("kv_connector_extra_config")["disk_path"] == config.disk_path
    assert told == whole
    assert config.disk_pool_gb is not None
    assert config.disk_pool_gb > config.ram_pool_gb


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # in what vLLM imports
@pytest.mark.parametrize("kind", ["compose", "kubernetes"])
def test_vllm_takes_the_arguments(kind: str, tiny_model: str) -> None:
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    local = [a.replace(MODEL, tiny_model) for a in arguments(kind)]
    parsed = AsyncEngineArgs.from_cli_args(parser.parse_args(local))
    assert parsed.model == tiny_model
    assert parsed.kv_transfer_config.kv_connector_module_path == "kvortex.connector"


def test_compose_has_room_for_the_pool() -> None:
    service, extra = compose(), transfer_config("compose")["kv_connector_extra_config"]
    assert service["ulimits"]["memlock"] == -1
    assert gib(service["mem_limit"]) > extra["ram_pool_gb"] + gib(service["shm_size"])
    mounts = [volume.partition(":")[2] for volume in service["volumes"]]
    assert extra["disk_path"] in mounts
    assert service["environment"]["XDG_CACHE_HOME"] in mounts
    assert service["environment"]["HF_HOME"] in mounts


def test_pod_has_room_for_the_pool() -> None:
    one, extra = container(), transfer_config("kubernetes")["kv_connector_extra_config"]
    assert one["resources"]["requests"] == one["resources"]["limits"]
    (shm,) = (v["emptyDir"] for v in pod()["volumes"] if v["name"] == "shm")
    room = gib(one["resources"]["limits"]["memory"]) - gib(shm["sizeLimit"])
    assert room > extra["ram_pool_gb"]
    kv, models = manifests()["StatefulSet"]["spec"]["volumeClaimTemplates"]
    assert gib(kv["spec"]["resources"]["requests"]["storage"]) > extra["disk_pool_gb"]
    mounts = {mount["name"]: mount["mountPath"] for mount in one["volumeMounts"]}
    assert mounts == {
        kv["metadata"]["name"]: extra["disk_path"],
        models["metadata"]["name"]: environment("HF_HOME"),
        "shm": "/dev/shm",
    }


def test_pod_may_download_a_gated_model_but_open_ones_need_no_secret() -> None:
    (token,) = (each for each in container()["env"] if each["name"] == "HF_TOKEN")
    assert token["valueFrom"]["secretKeyRef"]["optional"] is True


def test_manifests_name_each_other() -> None:
    found = manifests()
    labels = found["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert found["StatefulSet"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["StatefulSet"]["spec"]["serviceName"] == found["Service"]["metadata"]["name"]


def test_image_has_what_the_wheel_is_made_of(tmp_path: Path) -> None:
    """What Docker would send, by the ignore file, and what it would install from that."""
    context = tmp_path / "context"
    lines = (EXAMPLES / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert "*" in lines
    for name in kept:
        source, target = ROOT / name, context / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copy(source, target)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=context, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in ("connector/connector.py", "policies/lru_freq.py", "triton_kernels/paged_copy.py"):
        assert f"kvortex/{name}" in names
