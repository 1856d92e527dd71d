"""What an installation puts where: nothing but `kvortex` at the top, links followed."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import kvortex
from kvortex.policies import BUILT_IN

ROOT = Path(__file__).parent.parent
LOOK = (
    "import importlib.util, kvortex.policies, kvortex.triton_kernels\n"
    "print(importlib.util.find_spec('triton_kernels'), importlib.util.find_spec('policies'))"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """What a fresh interpreter prints."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as packed:
        return set(packed.namelist())


def test_wheel_holds_one_top_level_package(wheel: Path) -> None:
    names = names_in(wheel)
    assert "kvortex/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"kvortex"}
    assert "kvortex/policies/lru_freq.py" in names
    assert "kvortex/triton_kernels/paged_copy.py" in names
    assert "kvortex/connector/connector.py" in names


def test_wheel_works_and_leaves_other_triton_kernels_alone(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    where = "import kvortex; print(kvortex.__file__)"
    assert python("-c", where, cwd=tmp_path, path=installed).startswith(str(installed))
    assert python("-c", LOOK, cwd=tmp_path, path=installed) == "None None"


def test_editable_installation_leaves_other_triton_kernels_alone(tmp_path: Path) -> None:
    assert python("-c", LOOK, cwd=tmp_path) == "None None"


def test_editable_installation_is_found_from_the_folder_above_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "kvortex").symlink_to(ROOT)  # which looks like a namespace package from there
    where = "import kvortex; print(kvortex.__version__)"
    assert python("-c", where, cwd=tmp_path) == kvortex.__version__


def test_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run([*build, "-t", "sdist"], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    subprocess.run([*build, "-t", "wheel"], cwd=unpacked, check=True, capture_output=True)
    (built,) = tmp_path.glob("*.whl")
    assert names_in(built) == names_in(wheel)


def test_vllm_finds_its_own_triton_kernels(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    look = (
        "import importlib.util, vllm.utils.import_utils as u\n"
        "before = u._has_module('triton_kernels')\n"
        "import kvortex, kvortex.triton_kernels, kvortex.connector, sys\n"
        "print(before, u._has_module('triton_kernels'), 'triton_kernels' in sys.modules)"
    )
    assert python("-c", look, cwd=tmp_path).splitlines()[-1] == "False False False"


def test_module_runs_from_the_root_of_a_checkout() -> None:
    assert python("-m", "kvortex", "--version", cwd=ROOT) == f"kvortex {kvortex.__version__}"


def test_version_is_the_installed_one() -> None:
    assert version("kvortex") == kvortex.__version__


def test_built_in_policies_are_registered_like_any_other() -> None:
    registered = {entry.name: entry.load() for entry in entry_points(group="kvortex.policies")}
    assert registered == BUILT_IN


def test_public_import_needs_neither_torch_nor_vllm(tmp_path: Path) -> None:
    look = "import sys, kvortex; print({'torch', 'triton', 'vllm'} & set(sys.modules))"
    assert python("-c", look, cwd=tmp_path) == "set()"


def test_neither_commands_nor_the_scheduler_side_import_torch(tmp_path: Path) -> None:
    """The import contracts do not tell what a function imports from what its module does."""
    modules = "commands.command_line", "planning.plan", "scheduler", "disk.tool"
    look = (
        f"import sys, {', '.join(f'kvortex.{name}' for name in modules)}; "
        "print({'torch', 'triton', 'vllm'} & set(sys.modules))"
    )
    assert python("-c", look, cwd=tmp_path) == "set()"
