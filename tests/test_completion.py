"""`kvortex completion`: a real bash completes what it printed; the others know every command."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from kvortex.cli import main
from kvortex.commands.command_line import COMMANDS

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [command.__name__.rpartition(".")[2] for command in COMMANDS]
COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
$(complete -p kvortex | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For bash."""
    file = tmp_path_factory.mktemp("completion") / "kvortex.bash"
    with file.open("w") as script, contextlib.redirect_stdout(script):
        assert main(["completion", "bash"]) == 0
    return file


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ([""], NAMES),
        (["di"], ["disk"]),
        (["trace", ""], ["record", "info"]),
        (["disk", "clear", "--y"], ["--yes"]),
        (["config", "--ram"], ["--ram-pool-gb"]),
        (["completion", "z"], ["zsh"]),
    ],
)
def test_bash_completes(script: Path, words: list[str], completed: list[str]) -> None:
    command = ["bash", "-c", COMPLETE, "bash", str(script), "kvortex", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == completed


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "trace.gz").touch()
    words = ["kvortex", "simulate", str(tmp_path / "tra")]
    command = ["bash", "-c", COMPLETE, "bash", str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "trace.gz")]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_others_know_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*NAMES, "ram-pool-gb", "inspect"])
    if there := shutil.which(shell):
        subprocess.run([there, "-n"], input=shown, text=True, check=True)
