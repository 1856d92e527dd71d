"""What all tests share: hypothesis profiles, the interpreted kernel, the device, the leak check."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

os.environ |= {  # for vLLM, before anything imports it
    "OMP_NUM_THREADS": "1",
    "TRITON_F32_DEFAULT": "ieee",  # vLLM's attention rounds float32 to 19 bits otherwise
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
sys.path.insert(
    0, str(Path(__file__).parent)
)  # so that tests find their helpers in any import mode

RELAXED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
DRAWN = settings(max_examples=100, deadline=None, suppress_health_check=RELAXED, print_blob=True)
settings.register_profile("ci", DRAWN, derandomize=True, database=None)
UNSHRUNK = [Phase.explicit, Phase.generate]  # of a mutant it is enough to know that it fails
settings.register_profile("mutants", DRAWN, derandomize=True, database=None, phases=UNSHRUNK)
settings.register_profile("fuzz", DRAWN)  # with fresh seeds: `make fuzz` goes round and round
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _import_kernel() -> None:
    """Without a GPU the kernel is interpreted, and only it: vLLM must not see the variable."""
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
        import triton

        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        import kvortex.triton_kernels.paged_copy


_import_kernel()


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a former life left is adopted by one call, however slow the machine is."""
    monkeypatch.setattr("kvortex.overflow.ADOPT_S", math.inf)


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(
    scope="session", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the KV tensors are."""
    name: str = request.param
    if name == "cuda":
        torch.zeros(1, device=name)  # what CUDA keeps open from now on is no test's leak
    return torch.device(name)


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.is_alive()}


def _files() -> set[tuple[str, str]]:
    """Open file descriptors and what they are; not those of the GPU's driver."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(link.readlink())
            if not target.startswith(("/dev/nvidia", "/proc/", "anon_inode:")):
                found.add((link.name, target))
    return found


def _left_over(
    threads: set[threading.Thread], files: set[tuple[str, str]]
) -> list[threading.Thread | tuple[str, str]]:
    return [*(_threads() - threads), *(_files() - files)]


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves no thread and no file behind; vLLM's own tests are not held to it."""
    threads, files = _threads(), _files()
    yield
    if request.node.get_closest_marker("vllm"):
        return
    deadline = time.monotonic() + 2
    while left := _left_over(threads, files):
        gc.collect()
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {left}")
        time.sleep(0.01)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random Llama in float32."""
    from kvortex.tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def expected(tiny_model: str) -> list[list[int]]:
    """Outputs of a vLLM without KVortex, one prompt at a time."""
    from engines import LENGTHS, answers, prompts, running

    with running(tiny_model, None) as llm:
        return [answers(llm, [prompt])[0][0] for prompt in prompts(LENGTHS)]
