"""The `kvortex` command: what it prints, and how it refuses."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import kvortex
from kvortex import KVortexConfig
from kvortex.cli import main
from kvortex.commands.command_line import make_parser

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_config_prints_what_vllm_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--ram-pool-gb", "32", "--eviction-policy", "lru"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == KVortexConfig(ram_pool_gb=32, eviction_policy="lru").kv_transfer_config()
    assert printed["kv_connector_extra_config"]["ram_pool_gb"] == 32


def test_config_without_options_prints_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert json.loads(capsys.readouterr().out) == KVortexConfig().kv_transfer_config()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ram-pool-gb", "0"], ["ram_pool_gb='0'", "greater than 0"]),
        (["--ram-pool-gb", "much"], ["ram_pool_gb='much'", "valid number"]),
        (["--num-cuda-streams", "99"], ["num_cuda_streams='99'", "32"]),
        (["--eviction-policy", "mru"], ["eviction_policy='mru'", "lru_freq"]),
    ],
)
def test_bad_settings_are_one_line_and_code_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert all(word in shown.err for word in words)


@pytest.mark.parametrize(
    ("arguments", "command", "words"),
    [
        ([], "kvortex", "required: COMMAND"),
        (["nonsense"], "kvortex", "invalid choice: 'nonsense'"),
        (["--nonsense", "config"], "kvortex", "unrecognized arguments: --nonsense"),
        (["config", "--ram-pool", "x", "y"], "kvortex config", "unrecognized arguments: y"),
        (["plan", "model", "--gpu-memory", "much"], "kvortex plan", "invalid float value: 'much'"),
        (["trace", "record"], "kvortex trace record", "required: FILE"),
        (["trace", "info", "a", "b"], "kvortex trace info", "unrecognized arguments: b"),
    ],
)
def test_wrong_usage_is_code_2_and_one_line_that_names_the_help(
    arguments: list[str], command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{command}: ")
    assert line.endswith(f"; see {command} --help")
    assert words in line


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m kvortex config | head -c 0"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize("module", ["kvortex.core", "pydantic", "numpy", "kvortex.commands.plan"])
def test_ctrl_c_while_it_imports_ends_it_silently(module: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "kvortex", "top", "http://localhost:1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        imported = (line.rpartition("|")[2].strip() for line in running.stderr)
        assert module in imported  # as soon as it is
        running.send_signal(signal.SIGINT)
        rest = running.stderr.readlines()
    assert running.returncode == 130
    assert [line for line in rest if not line.startswith("import time:")] == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"kvortex {kvortex.__version__}"


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["config", "--help"])
    shown = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in shown for name in KVortexConfig.model_fields)


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


@pytest.mark.parametrize("parser", [*parsers(make_parser())], ids=lambda parser: str(parser.prog))
def test_every_help_has_an_example_of_its_own_command(parser: argparse.ArgumentParser) -> None:
    assert parser.epilog is not None
    assert "example" in parser.epilog
    assert parser.prog in parser.epilog
    assert parser.epilog in parser.format_help()  # on one line, to be copied
