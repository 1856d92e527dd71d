"""`kvortex top`, the dashboard and the alert rules, all on the /metrics of one real server."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from kvortex import KVortexConfig
from kvortex.activity import OURS
from kvortex.cli import main
from kvortex.commands.top import ENTER, HOME, LEAVE
from kvortex.metrics import MISSED, Counters, Gauges, MissReason
from kvortex.scrape import Scrape, scrape
from kvortex.server import Server
from kvortex.top import View

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

pytest.importorskip("vllm")
yaml = pytest.importorskip("yaml")
pytestmark = [pytest.mark.vllm]

BLOCK = 32
LENGTHS = [33, 500, 700, 1000, 1200, 1500]
ARGUMENTS = "--enforce-eager --dtype float32 --seed 0 --max-model-len 2048 --max-num-seqs 8"
ARGUMENTS += f" --block-size {BLOCK} --kv-cache-memory-bytes {64 << 20}"
DASHBOARDS = Path(__file__).parent.parent / "dashboards"
LEFT_OUT = {"disk_survivors_total", "disk_invalid_records_total", "disk_removed_caches_total"}
"""Told once, at start."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's, which it makes itself."""
    return tmp_path_factory.mktemp("disk") / "of-the-server"


@pytest.fixture(scope="module")
def server(
    tiny_model: str, disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Prompts came twice, the second time from host and disk."""
    draw = random.Random(0)
    prompts = [[draw.randrange(4, 260) for _ in range(length)] for length in LENGTHS]
    config = KVortexConfig(
        ram_pool_gb=0.016,
        admission="always",
        load="always",
        disk_path=str(disk),
        disk_pool_gb=0.25,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        folder = tmp_path_factory.mktemp("server")
        transfer = config.kv_transfer_config()
        with Server(tiny_model, folder, ARGUMENTS.split(), transfer) as running:
            for _ in range(2):
                for prompt in prompts:
                    running.complete(prompt, 2)
                running.reset_prefix_cache()
            yield running


def answer(server: Server, prompt: list[int], **params: object) -> Any:
    """Not streamed, with kv_transfer_params."""
    body = {"model": "model", "prompt": prompt, "max_tokens": 2, "kv_transfer_params": params}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=600)
    return response.raise_for_status().json()


def shown(text: str) -> set[str]:
    """Names of metrics in an expression."""
    return set(re.findall(r"vllm:\w+", text))


def expressions() -> list[str]:
    """Of all panels and all rules."""
    dashboard = json.loads((DASHBOARDS / "kvortex.json").read_text())
    rules = yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    found += [variable.get("definition", "") for variable in dashboard["templating"]["list"]]
    return found + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def test_every_token_was_hit_or_missed(server: Server) -> None:
    asked = 2 * sum((length - 1) // BLOCK * BLOCK for length in LENGTHS)
    hits = server.counter("vllm:prefix_cache_hits") + server.counter(OURS + "hit_tokens")
    assert server.counter("vllm:external_prefix_cache_hits") == server.counter(OURS + "hit_tokens")
    assert server.counter(OURS + "disk_hit_tokens") > 0
    assert hits + server.counter(OURS + "missed_tokens") == asked


def test_top_tells_what_the_server_does(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", server.url, "--once", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recent"] is None
    assert told["state"]["slots"] > 0
    total = told["total"]
    assert total["asked_tokens"] == 2 * sum(LENGTHS)
    assert total["host_tokens"] + total["disk_tokens"] == server.counter(OURS + "hit_tokens")
    assert total["disk_tokens"] == server.counter(OURS + "disk_hit_tokens")
    assert total["missed_tokens"].keys() == {reason.value for reason in MissReason}
    assert total["missed_tokens"]["never_stored"] > 0
    assert total["evicted_blocks"] > 0
    assert total["saved_seconds"] > 0
    assert not any(total["failures"].values())
    assert main(["top", server.url, "--once"]) == 0
    assert "missed: never stored" in capsys.readouterr().out


def test_a_live_view_ends_with_ctrl_c(server: Server) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "kvortex", "top", server.url, "--interval", "0.1"]
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE) as top:
        os.close(follower)
        screen = ""
        while screen.count(HOME) < 3:
            screen += os.read(leader, 1 << 16).decode()
        assert screen.startswith(ENTER)
        assert "hit in host memory" in screen
        top.send_signal(signal.SIGINT)
        while not screen.endswith(LEAVE):
            screen += os.read(leader, 1 << 16).decode()
        assert top.wait(30) == 0
        assert top.stderr is not None
        assert top.stderr.read() == b""
    os.close(leader)


def test_top_asks_for_nothing_that_is_not_there(server: Server) -> None:
    asked: set[str] = set()

    class Recording(dict[str, "Mapping[Any, float]"]):
        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return super().get(name, default)

    there = scrape(server.url)
    View.of(Scrape(there.at, Recording(there.samples)))
    assert len(asked) > 30
    assert asked <= there.samples.keys()


def test_no_panel_and_no_rule_names_what_is_not_there(server: Server) -> None:
    samples = scrape(server.url).samples
    named = {name for expression in expressions() for name in shown(expression)}
    assert len(named) > 30
    assert named <= samples.keys()
    labels = {label for values in samples.values() for one in values for label, _ in one}
    labels |= {"instance", "job"}  # which Prometheus adds
    for expression in expressions():
        for group in re.findall(r"(?:by|on) \(([^)]*)\)", expression):
            assert {label.strip() for label in group.split(",")} <= labels
        for matched in re.findall(r"[{,]\s*(\w+)=", expression):
            assert matched in labels


def test_no_panel_divides_by_an_idle_server() -> None:
    """Grafana shows NaN for 0 / 0, which looks like a fault."""
    divided = [expression for expression in expressions() if "/ " in expression]
    assert len(divided) > 5
    for expression in divided:
        for divisor in expression.split("/ ")[1:]:
            assert "> 0" in divisor, expression


def test_every_metric_of_ours_is_shown(server: Server) -> None:
    there = {name for name in scrape(server.url).samples if name.startswith(OURS)}
    there = {name for name in there if not name.endswith("_created")}
    counters = {name for name in Counters().as_dict() if not name.startswith(MISSED)}
    assert there == {f"{OURS}{name}_total" for name in (*counters, "missed_tokens")} | {
        OURS + name for name in Gauges().as_dict()
    }
    dashboard = (DASHBOARDS / "kvortex.json").read_text()
    assert there - shown(dashboard) == {OURS + name for name in LEFT_OUT}


def test_a_client_is_told_why(server: Server) -> None:
    prompt = [5 + i % 200 for i in range(5 * BLOCK + 1)]
    told = answer(server, prompt, explain=True)["kv_transfer_params"]["kvortex"]
    missed = {"never_stored": 5 * BLOCK}
    assert told == {"gpu_tokens": 0, "loaded_tokens": 0, "missed_tokens": missed}
    time.sleep(0.5)
    server.reset_prefix_cache()
    told = answer(server, prompt, explain=True, max_load_tokens=2 * BLOCK)["kv_transfer_params"]
    assert told["kvortex"]["loaded_tokens"] == 2 * BLOCK
    assert told["kvortex"]["missed_tokens"] == {"limit": 3 * BLOCK}
    assert answer(server, prompt)["kv_transfer_params"] is None


def test_a_drive_that_fails_is_seen_to_be_off(
    server: Server, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last test of this server: somebody cuts off what is in its file."""
    (slots,) = disk.glob("*/rank-0/slots")
    draw = random.Random(0)
    prompts = [[draw.randrange(4, 260) for _ in range(length)] for length in LENGTHS]
    right = [server.complete(prompt, 2).token_ids for prompt in prompts]
    assert scrape(server.url).total(OURS + "disk_reading_off") == 0
    os.truncate(slots, 0)
    deadline = time.monotonic() + 60
    while scrape(server.url).total(OURS + "disk_reading_off") == 0:
        assert time.monotonic() < deadline
        server.reset_prefix_cache()
        assert [server.complete(prompt, 2).token_ids for prompt in prompts] == right
    assert server.counter(OURS + "disk_read_errors") >= 3
    assert server.counter(OURS + "disk_times_off") == 1
    assert main(["top", server.url, "--once"]) == 0
    assert "READING FROM DISK IS OFF on 1 rank(s)" in capsys.readouterr().out
