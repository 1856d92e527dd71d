"""`kvortex bench`: measured for real, ended for sure, honest about what is not as it should be."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvortex import KVortexConfig
from kvortex.benchmark.conversations import Conversed
from kvortex.benchmark.first_token import COLD, DISK, GPU, HOST, Sample, _ask
from kvortex.benchmark.measured import Measured
from kvortex.benchmark.plan import Plan
from kvortex.benchmark.report import Report
from kvortex.benchmark.run import run_task
from kvortex.benchmark.serving import Asked
from kvortex.benchmark.table import table
from kvortex.benchmark.task import BenchmarkError, Conversations, Task
from kvortex.benchmark.ways import KVORTEX, NONE, SIMPLE, WAYS, kv_transfer_config
from kvortex.cli import main
from kvortex.scrape import Scrape

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK, LENGTH = 16, 161
WHOLE = 160
SERVED = {COLD: (0, 0, 0), GPU: (WHOLE, 0, 0), HOST: (0, WHOLE, 0), DISK: (0, 0, WHOLE)}
CONVERSED = Conversed(4, 2.0, 1000, 800, 128, (0.1, 0.2, 0.3, 0.4), ("a", "b"))
SHAPE = Conversations(users=2, context=200)
SMALL = ("--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20))
MACHINE = {"device": "a GPU", "vllm": "0.32.0", "date": "2026-01-01"}


def sample(source: str, prompt: int = 1, **told: Any) -> Sample:
    gpu, host, disk = SERVED[source]
    seconds = {COLD: 0.1, GPU: 0.01, HOST: 0.02, DISK: 0.03}[source]
    return replace(Sample(LENGTH, prompt, source, seconds, gpu, host, disk, {}, (1, 2)), **told)


def measured(*samples: Sample, conversed: Conversed | None = CONVERSED) -> Measured:
    return Measured(30.0, BLOCK, 1600, samples, conversed)


def report(kvortex: Measured, **told: Any) -> Report:
    plan = Plan(
        name="a model",
        model="/models/a",
        config=KVortexConfig(ram_pool_gb=1),
        ways=(NONE, KVORTEX),
        lengths=(LENGTH,),
        repeats=2,
        conversations=SHAPE,
        users_on_gpu=1,
        vllm_arguments=(),
    )
    alone = measured(*(sample(source, n) for source in (COLD, GPU) for n in (1, 2)))
    return Report(plan, MACHINE, {NONE: alone, KVORTEX: kvortex}, told)


def whole(change: Callable[[Sample], Sample] = lambda sample: sample) -> Measured:
    """Samples of every source, each changed."""
    return measured(*(change(sample(source, n)) for source in SERVED for n in (1, 2)))


def test_figures_that_may_be_believed() -> None:
    told = report(whole())
    assert told.problems() == []
    lines = table(told).splitlines()
    assert lines[1] == (
        "a model: KV cache of 1,600 tokens on the GPU, 1 GiB of host memory; medians of 2"
    )
    rows = [line.split() for line in lines]
    assert ["161", "tokens,", "computed", "100.0", "ms", "100.0", "ms"] in rows
    assert ["161", "tokens,", "host", "hit", "-", "20.0", "ms"] in rows
    assert ["161", "tokens,", "disk", "hit", "-", "30.0", "ms"] in rows
    assert ["requests/s", "2", "2"] in rows
    assert ["users", "with", "the", "same", "answers", "100%", "100%"] in rows
    assert lines[-1] == (
        "A prompt of 161 tokens that returns begins 5.0 times as soon from host, 3.3 times as soon "
        "from disk."
    )
    printed = json.loads(json.dumps(told.as_dict()))
    (*_, disk) = printed["ways"]["kvortex"]["first_token"]
    assert (disk["source"], disk["median_s"], disk["served_share"]) == ("disk", 0.03, 1.0)
    assert printed["ways"]["kvortex"]["conversations"]["cached_share"] == 0.8


def test_a_gain_is_over_vllm_alone_where_that_was_measured() -> None:
    """Else a KVortex that made computing slower would boast of it."""
    told = report(whole(lambda each: replace(each, seconds=0.3) if each.source == COLD else each))
    assert "begins 5.0 times as soon from host" in table(told)
    unpaired = replace(told, measured={KVORTEX: told.measured[KVORTEX]})
    assert "begins 15.0 times as soon from host" in table(unpaired)


def test_a_tier_that_is_slower_than_computing_is_told() -> None:
    slow = whole(lambda each: replace(each, seconds=0.2) if each.source == DISK else each)
    assert table(report(slow)).endswith(
        "0.5 times as soon from disk.\n\nFrom disk that takes longer than to compute it: a server "
        "computes it instead, once it has seen both."
    )


@pytest.mark.parametrize(
    ("source", "change", "words"),
    [
        (COLD, {"host_tokens": BLOCK}, "KVortex, computed of 161 tokens: 10% served from there"),
        (HOST, {"host_tokens": 0, "missed_tokens": {"evicted": WHOLE}}, "host hit .*evicted"),
        (DISK, {"disk_tokens": 0, "host_tokens": WHOLE}, "disk hit .*: 0% served .*not there"),
        (HOST, {"answer": (1, 3)}, "an output differs: KVortex, host hit .* of a GPU hit"),
        (DISK, {"answer": (1, 3)}, "an output differs: KVortex, disk hit .* of a GPU hit"),
        (COLD, {"answer": (1, 3)}, "an output differs: KVortex, computed .* of vLLM alone"),
    ],
)
def test_figures_that_may_not(source: str, change: dict[str, Any], words: str) -> None:
    told = report(whole(lambda each: replace(each, **change) if each.source == source else each))
    problems = told.problems()
    assert problems
    assert all("\n" not in problem for problem in problems)
    assert any(re.search(words, problem) for problem in problems)


def test_what_does_not_pay_is_shown_and_no_problem() -> None:
    """Nor is it compared: what is computed otherwise is rounded otherwise."""
    unpaid: dict[str, Any] = {
        "host_tokens": 0,
        "missed_tokens": {"not_worth_loading": WHOLE},
        "answer": (7,),
    }
    told = report(whole(lambda each: replace(each, **unpaid) if each.source == HOST else each))
    assert told.problems() == []
    assert "20.0 ms (0%, not_worth_loading)" in table(told)


def test_a_way_that_failed_is_told_and_the_others_are_shown() -> None:
    told = report(whole(), simple="no GPU")
    assert told.problems() == ["SimpleCPUOffloadConnector failed: no GPU"]
    assert "host hit" in table(told)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_what_was_measured_before_an_interrupt_is_shown(
    before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way takes minutes with a real model."""
    plan, done = replace(report(whole()).plan, ways=(NONE, KVORTEX, SIMPLE)), list[Task]()

    def interrupted(task: Task, _say: object) -> Measured:
        if len(done) == before:
            raise KeyboardInterrupt
        done.append(task)
        return whole()

    monkeypatch.setattr("kvortex.benchmark.plan.run_task", interrupted)
    if not before:
        with pytest.raises(KeyboardInterrupt):
            plan.carry_out(lambda _: None)
        return
    told = Report(plan, MACHINE, *plan.carry_out(lambda _: None))
    assert list(told.measured) == [NONE, KVORTEX][:before]
    assert told.failed == dict.fromkeys([NONE, KVORTEX, SIMPLE][before:], "interrupted")
    assert "GPU hit" in table(told)


def test_other_answers_are_counted_by_user() -> None:
    other = replace(CONVERSED, answers=("a", "other"))
    told = report(measured(*whole().samples, conversed=other))
    assert told.equal_answers(KVORTEX) == 0.5


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code = (
        "import pickle, sys; from pathlib import Path; from kvortex.benchmark.picture import draw; "
        "draw(pickle.load(sys.stdin.buffer), Path(sys.argv[1]))"
    )  # in a process of its own: matplotlib keeps fonts open
    command = [sys.executable, "-c", code, str(tmp_path / "bench.png")]
    subprocess.run(command, input=pickle.dumps(report(whole())), check=True)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--users", "-1"], "--users -1: use 0 or more"),
        (["--prompt-tokens", "2048", "3"], "--prompt-tokens 3: use 64 or more"),
        (["--repeats", "0"], "--repeats 0: use 1 or more"),
        (["--context", "1"], "--context 1: use 64 or more"),
        (["--users-on-gpu", "-2"], "--users-on-gpu -2: use 0 or more"),
        (["--plot", "/no/folder/b.png"], "--plot /no/folder/b.png: there is no folder"),
        (["--plot", "/tmp"], "--plot /tmp: it is a folder"),
        (["--plot", "/tmp/b.foo"], "--plot /tmp/b.foo: use a name that ends with .png"),
        (["--ram-pool-gb", "60000"], "ram_pool_gb=60000: this machine has"),
        (["--disk-path", "/tmp"], "set disk_pool_gb too"),
        (["--disk-path", "/tmp", "--disk-pool-gb", "900000"], "lower disk_pool_gb"),
        (["--model", "./nowhere"], "--model ./nowhere: there is no such folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_task_and_what_it_measured_travel() -> None:
    task = Task("m", {"kv_role": "kv_both"}, ("--x",), (1, 2), gpu_tokens=5, conversations=SHAPE)
    assert Task.from_json(task.to_json()) == task
    assert Task.from_json(replace(task, conversations=None).to_json()).conversations is None
    found = whole()
    assert Measured.from_dict(json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.vllm
def test_what_the_first_vllm_refuses_ends_it_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The log is kept, and no other vLLM is asked for the same."""
    pytest.importorskip("vllm")
    assert main(["bench", "--ram-pool-gb", "0.3", "--", "--no-such-flag"]) == 1
    shown = capsys.readouterr()
    *progress, line = shown.err.splitlines()
    assert shown.out == ""
    assert [told for told in progress if "vLLM starts" in told] == [progress[-1]]
    assert line.startswith("kvortex: vLLM alone failed: vLLM's arguments: unrecognized arguments")
    log = Path(line.rpartition("log: ")[2].rstrip(")"))
    assert log.is_file()
    log.unlink()


@pytest.mark.vllm
def test_what_kvortex_refuses_in_a_benchmark_is_told_in_its_words(tiny_model: str) -> None:
    pytest.importorskip("vllm")
    transfer = kv_transfer_config(KVORTEX, KVortexConfig()) or {}
    transfer |= {"kv_connector_extra_config": {"ram_pool": 3}}
    with pytest.raises(BenchmarkError, match=r"^KVortex cannot start: unknown setting") as caught:
        run_task(Task(tiny_model, transfer, SMALL, (64,)), lambda _: None)
    line = str(caught.value)
    assert "\n" not in line
    Path(line.rpartition("log: ")[2].rstrip(")")).unlink()


@pytest.mark.vllm
def test_a_terminated_benchmark_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    command = [sys.executable, "-m", "kvortex", "bench", "--ram-pool-gb", "0.3"]
    bench = subprocess.Popen(
        command, env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True
    )
    assert bench.stderr is not None
    while "vLLM starts" not in (line := bench.stderr.readline()):
        assert line
    (child,) = children(bench.pid)
    bench.terminate()
    bench.communicate(timeout=60)
    assert bench.returncode == 130
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_a_whole_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without and with KVortex, and once more from disk: every hit is one, every output equal."""
    pytest.importorskip("vllm")
    command = ["bench", "--ram-pool-gb", "0.3", "--disk-path", str(tmp_path / "kv")]
    command += ["--disk-pool-gb", "0.6", "--prompt-tokens", "300", "--repeats", "1"]
    command += ["--users", "4", "--context", "300", "--users-on-gpu", "1", "--json"]
    assert main([*command, "--", "--max-num-seqs", "4"]) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert told["problems"] == []
    assert told["vllm_arguments"][-2:] == ["--max-num-seqs", "4"]
    assert "KVortex, again: vLLM is up after" in shown.err
    shares = {
        way: {row["source"]: row["served_share"] for row in told["ways"][way]["first_token"]}
        for way in told["ways"]
    }
    assert shares == {
        NONE: {COLD: 0, GPU: 1},
        KVORTEX: {COLD: 0, GPU: 1, HOST: 1, DISK: 1},
    }
    alone, with_kvortex = (told["ways"][way]["conversations"] for way in (NONE, KVORTEX))
    assert with_kvortex["equal_answers"] == 1
    assert with_kvortex["cached_share"] > 0.8 > alone["cached_share"]
    assert list((tmp_path / "kv").iterdir()) == []


def test_every_way_has_as_much_host_memory() -> None:
    config = KVortexConfig(ram_pool_gb=2)
    told = [kv_transfer_config(way, config) or {} for way in WAYS]
    extras = [each.get("kv_connector_extra_config", {}) for each in told]
    sizes = [e.get("cpu_bytes_to_use", e.get("ram_pool_gb", 0) * (1 << 30)) for e in extras]
    assert sizes == [0, 2 << 30, 2 << 30, 2 << 30]


class Silent:
    """Serves a prompt, 96 tokens of it from somewhere, and counts so many of these by tier."""

    def __init__(self, gpu: int, external: int, disk: int) -> None:
        self._counted = {
            "vllm:prefix_cache_hits_total": gpu,
            "vllm:external_prefix_cache_hits_total": external,
            "vllm:kvortex_disk_hit_tokens_total": disk,
        }
        self._times = 0

    def metrics(self) -> Scrape:
        lines = (f"{name} {self._times * count}" for name, count in self._counted.items())
        return Scrape.of("\n".join(lines), 0.0)

    def ask(self, prompt: list[int], tokens: int) -> Asked:
        self._times += 1
        return Asked(prompt, 0.0, [7] * tokens, [1.0] * tokens, cached=96)


@pytest.mark.parametrize(
    ("counted", "source", "served"),
    [
        ((64, 32, 0), HOST, (64, 32, 0)),
        ((0, 96, 80), DISK, (0, 16, 80)),
        ((0, 0, 0), HOST, (0, 96, 0)),
        ((0, 0, 0), GPU, (96, 0, 0)),
        ((0, 0, 0), DISK, (0, 0, 96)),
        ((0, 0, 0), COLD, (0, 0, 0)),
        ((32, 0, 0), HOST, (32, 64, 0)),
    ],
)
def test_what_metrics_do_not_count_came_from_where_it_should(
    counted: tuple[int, int, int], source: str, served: tuple[int, int, int]
) -> None:
    serving: Any = Silent(*counted)
    serving.ask([], 1)
    sample = _ask(serving, [1] * 100, 1, source)
    assert (sample.gpu_tokens, sample.host_tokens, sample.disk_tokens) == served
