"""Puts the Python of a vLLM wheel over the extensions of the CPU build that is installed.

Most versions of vLLM come for CUDA only. Their schedulers need nothing of that and run anywhere:
`python tests/other_vllm.py WHEEL FOLDER`, then with the folder on PYTHONPATH.
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile


def unpack(wheel: Path, folder: Path) -> None:
    """The version says `cpu`, by which vLLM knows on what it runs."""
    with ZipFile(wheel) as archive:
        archive.extractall(folder, (name for name in archive.namelist() if name.endswith(".py")))
    version = wheel.name.split("-")[1]
    info = folder / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def add_extensions(folder: Path) -> None:
    found = find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    installed = Path(found.origin).parent
    for extension in installed.rglob("*.so"):
        shutil.copy(extension, folder / "vllm" / extension.relative_to(installed))


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
    add_extensions(Path(sys.argv[2]))
