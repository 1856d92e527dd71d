"""README and docs: every command and every snippet is run, names are complete, the pages build."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvortex import KVortexConfig
from kvortex.metrics import MISSED, Counters, Gauges, MissReason
from kvortex.server import Server

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)([^)#]*)(#[^)]*)?\)")
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
SMALL = {
    "enforce_eager": True,
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 2048,
    "kv_cache_memory_bytes": 64 << 20,
}
"""What vLLM needs to be told on a machine without a GPU, and what keeps it quick."""
OPTIONS = "--enforce-eager --dtype float32 --block-size 32 --max-model-len 2048"
OPTIONS += f" --kv-cache-memory-bytes {64 << 20}"
RECORDER = f"""#!{sys.executable}
import json, os, sys
print(json.dumps(sys.argv[1:]), file=open(os.environ["RECORDED"], "w"))
"""
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def blocks(document: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return [text for name, text in FENCED.findall(document.read_text()) if name == language]


def commands() -> list[Any]:
    """Every line after a dollar sign, once."""
    lines = {
        line.removeprefix("$ ").partition("  #")[0].strip(): document
        for document in DOCUMENTS
        for text in blocks(document, "console")
        for line in text.splitlines()
        if line.startswith("$ ")
    }
    return [pytest.param(line, id=f"{at.name}: {line}") for line, at in lines.items()]


def snippets(*without: str) -> list[Any]:
    """Every block of Python but those that hold one of these words."""
    found = [(at, text) for at in DOCUMENTS for text in blocks(at, "python")]
    return [
        pytest.param(text, id=f"{at.name}: {text.splitlines()[0]}")
        for at, text in found
        if not any(word in text for word in without)
    ]


@dataclass(frozen=True)
class Place:
    """A folder in which the commands are run as they stand, but for names of what is in it."""

    folder: Path
    model: str
    url: str = "http://localhost:8000"

    def environment(self) -> dict[str, str]:
        """With the tested commands first, and a `vllm` that only notes what it was asked."""
        path = f"{self.folder / 'bin'}:{BIN}:{os.environ['PATH']}"
        return os.environ | {"PATH": path, "RECORDED": str(self.folder / "recorded.json")}

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """In a shell, as a reader would."""
        for name, here in (
            ("MODEL_DIR", self.model),
            (" MODEL ", f" {self.model} "),
            ("http://localhost:8000", self.url),
            ("/nvme/kvortex", str(self.folder / "disk")),
            ("python examples", f"{shlex.quote(sys.executable)} {ROOT}/examples"),
        ):
            command = command.replace(name, here)
        if command.startswith("pip install"):
            command = command.replace("install ", f"install --no-deps --target {self.folder}/site ")
            command = command.replace("install ", "install --no-build-isolation --quiet ")
            command = f"cd {ROOT} && {command.replace('pip', f'{sys.executable} -m pip', 1)}"
        if command.startswith("kvortex bench"):  # takes minutes, and has a test of its own
            command += " --help"
        if command.startswith("make "):
            command = f"make -C {ROOT} -n -o .venv/ready BIN={BIN} {command.removeprefix('make ')}"
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    def asked_of_vllm(self) -> list[str]:
        """What the last `vllm` was asked."""
        asked: list[str] = json.loads((self.folder / "recorded.json").read_text())
        return asked


def write_trace(path: Path) -> None:
    """In the format that was published with Mooncake."""
    requests = [
        {"timestamp": n, "input_length": 1536, "output_length": 9, "hash_ids": [n % 7, n, 1000 + n]}
        for n in range(100)
    ]
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))


@pytest.fixture(scope="module")
def place(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With a model that can chat, traces, and an empty disk."""
    folder = tmp_path_factory.mktemp("reader")
    model = folder / "model"
    model.mkdir()
    for file in Path(tiny_model).iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = CHAT_TEMPLATE
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "disk").mkdir()
    (folder / "bin").mkdir()
    (folder / "bin" / "vllm").write_text(RECORDER)
    (folder / "bin" / "vllm").chmod(0o755)
    for name in ("trace.jsonl", "trace.gz"):
        write_trace(folder / name)
    return Place(folder, str(model))


@pytest.fixture(scope="module")
def served(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The server that the README's command starts, with a smaller pool."""
    pytest.importorskip("vllm")
    (command,) = {
        line.values[0]
        for line in commands()
        if line.values[0].startswith("vllm serve") and "kvortex config" in line.values[0]
    }
    done = place.run(command.replace("--ram-pool-gb 32", "--ram-pool-gb 0.25"))
    assert done.returncode == 0, done.stderr
    serve, model, flag, transfer = place.asked_of_vllm()
    assert (serve, model, flag) == ("serve", place.model, "--kv-transfer-config")
    folder = tmp_path_factory.mktemp("server")
    with Server(model, folder, OPTIONS.split(), json.loads(transfer)) as server:
        yield Place(place.folder, place.model, server.url)


def requires_a_server(command: str) -> bool:
    return "localhost" in command


def requires_vllm(command: str) -> bool:
    return command.startswith("vllm serve")


@pytest.mark.parametrize(
    "command",
    [
        line
        for line in commands()
        if not requires_a_server(line.values[0]) and not requires_vllm(line.values[0])
    ],
)
def test_command_does_what_is_said(command: str, place: Place) -> None:
    done = place.run(command)
    if command == "kvortex tune" and "0 NVIDIA GPUs" in done.stderr:
        assert done.returncode == 2
        return
    if command.startswith("kvortex simulate") and "clock" in command:
        assert done.returncode == 2  # it is installed into a folder that Python does not look into
        done = place.run(f"PYTHONPATH={place.folder}/site:${{PYTHONPATH:-}} {command}")
    unfit = command.startswith("kvortex doctor") and done.returncode == 1
    assert done.returncode == 0 or unfit, done.stdout + done.stderr
    assert done.stdout or command.startswith("pip")


@pytest.mark.vllm
@pytest.mark.parametrize("command", [line for line in commands() if requires_vllm(line.values[0])])
def test_server_takes_what_it_is_told(command: str, place: Place) -> None:
    pytest.importorskip("vllm")
    from vllm.config import KVTransferConfig

    done = place.run(command)
    assert done.returncode == 0, done.stderr
    serve, model, flag, transfer = place.asked_of_vllm()
    assert (serve, model, flag) == ("serve", place.model, "--kv-transfer-config")
    read = KVTransferConfig(**json.loads(transfer))
    KVortexConfig.from_extra_config(read.kv_connector_extra_config)


@pytest.mark.vllm
@pytest.mark.parametrize(
    "command", [line for line in commands() if requires_a_server(line.values[0])]
)
def test_command_is_answered_by_the_server(command: str, served: Place) -> None:
    done = served.run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    if "chat.py" in command:
        assert done.stdout.count("gpu_tokens") == 3
        assert "the server has no KVortex" not in done.stdout
    else:
        assert "missed" in done.stdout


@pytest.mark.vllm
@pytest.mark.parametrize("snippet", [s for s in snippets() if "OpenAI(" in s.values[0]])
def test_client_is_told_why(
    snippet: str, served: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(snippet.replace("http://localhost:8000", served.url), {})
    assert "missed_tokens" in capsys.readouterr().out


@pytest.mark.vllm
@pytest.mark.parametrize("snippet", [s for s in snippets() if "LLM(" in s.values[0]])
def test_snippet_restores_a_prompt(snippet: str, place: Place) -> None:
    pytest.importorskip("vllm")
    small = ", ".join(f"{name}={value!r}" for name, value in SMALL.items())
    program = snippet.replace(f'model="{MODEL}"', f"model={place.model!r}, {small}")
    program = program.replace("ram_pool_gb=32", "ram_pool_gb=0.25")
    assert program.count(place.model) == 1
    program += (
        "llm.generate(['once upon a time ' * 20])\n"
        "while not llm.reset_prefix_cache():\n    llm.generate(['.'])\n"
        "print('cached', llm.generate(['once upon a time ' * 20])[0].num_cached_tokens)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=place.folder,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"cached (\d+)", done.stdout) == ["320"]


@pytest.mark.parametrize("snippet", snippets("OpenAI(", "LLM("))
def test_snippet_runs(snippet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (policy,) = (s.values[0] for s in snippets() if "class MyPolicy" in s.values[0])
    theirs = type(sys)("my_package")
    exec(policy, theirs.__dict__)
    monkeypatch.setitem(sys.modules, "my_package", theirs)
    exec(snippet, {})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_settings_are_what_they_are_called(document: Path) -> None:
    for text in blocks(document, "json"):
        told = json.loads(text)
        config = KVortexConfig.from_extra_config(told["kv_connector_extra_config"])
        assert told.items() <= (config.kv_transfer_config() | told).items()
        assert told.keys() == config.kv_transfer_config().keys()
    for text in blocks(document, "toml"):
        tomllib.loads(text)


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in LINK.findall(document.read_text()):
        there = document.parent / target if target else document
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor.removeprefix("#") in slugs, target + anchor


def test_the_map_of_the_code_is_whole() -> None:
    text = (ROOT / "README.md").read_text()
    told = text.partition("## What is where")[2].partition("## Taking part")[0]
    inside = told.partition("kvortex/\n")[2].partition("triton_kernels/ ")[0]
    named = set(re.findall(r"(\w{2,}(?:\.py|/))", inside))
    there = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / "kvortex").iterdir()
        if not path.is_symlink() and not path.name.startswith("__") and path.suffix != ".typed"
    }
    assert there - named == set()
    assert {name for name in named if not list((ROOT / "kvortex").rglob(name.rstrip("/")))} == set()


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_the_first_figures_were_measured(name: str) -> None:
    with (ROOT / "bench" / "results" / "ttft.csv").open(newline="") as file:
        measured = {
            row["way"]: f"{float(row['host_hit_p50_s']):.3f}"
            for row in csv.DictReader(file)
            if (row["device"], row["vllm"], row["date"], row["prompt_tokens"])
            == ("NVIDIA H200", "0.26.0", "2026-11-24", "32768")
        }
    told = (ROOT / name).read_text()
    text = told.partition("32 768 tokens")[2].partition("in the same run")[0]
    figures = re.findall(r"\b\d\.\d{3}\b", text)
    assert figures == [measured[way] for way in ("kvortex", "none", "native", "simple")]


def test_every_metric_and_every_reason_is_explained() -> None:
    told = (ROOT / "docs" / "metrics.md").read_text()
    names = [name for name in Counters().as_dict() if not name.startswith(MISSED)]
    for name in (*names, *Gauges().as_dict(), "missed_tokens"):
        assert f"`{name}" in told, name
    reasons = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert all(f"| `{reason}` |" in reasons for reason in MissReason)


def test_every_alert_is_explained() -> None:
    rules = (ROOT / "dashboards" / "alerts.yml").read_text()
    told = (ROOT / "docs" / "operations.md").read_text()
    alerts = re.findall(r"- alert: (\w+).*?severity: (\w+)", rules, re.DOTALL)
    assert alerts
    assert all(f"| `{alert}` | {severity} |" in told for alert, severity in alerts)


def test_pages_build_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    settings = (tmp_path / "configuration" / "index.html").read_text()
    assert all(f"<code>{name}</code>" in settings for name in KVortexConfig.model_fields)
    commands_page = (tmp_path / "command-line" / "index.html").read_text()
    for name in ("kvortex trace record", "kvortex disk inspect", "kvortex top"):
        assert f"usage: {name}" in commands_page
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r'(?:<script[^>]* src|<link[^>]* href|<img[^>]* src)="(https?:[^"]*)"', page.read_text()
        )
        assert loaded == []
