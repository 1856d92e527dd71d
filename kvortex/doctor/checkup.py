"""checkup: asks one question after another, whatever becomes of those before."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from kvortex.doctor import drive, gpu, memory, versions
from kvortex.doctor.finding import Finding, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Check = Callable[[], Finding | list[Finding]]


def checkup(disk_path: Path | None, progress: Callable[[str], None]) -> list[Finding]:
    """Look at everything.

    Args:
        disk_path: folder whose drive is measured, if any.
        progress: told the subject that is looked at next.
    """
    findings: list[Finding] = []
    with _silence():
        for subject, check in checks(disk_path):
            progress(subject)
            findings += run(subject, check)
    return findings


def run(subject: str, check: Check) -> list[Finding]:
    """What a check found; if it fails itself, that."""
    try:
        found = check()
    except Exception as error:  # noqa: BLE001  (a machine is full of surprises)
        reason = (str(error).splitlines() or [""])[0]
        what = f"cannot be looked at: {type(error).__name__}: {reason}"
        return [Finding(subject, Verdict.UNSEEN, what)]
    return found if isinstance(found, list) else [found]


def checks(disk_path: Path | None) -> list[tuple[str, Check]]:
    """What is asked, by subject, in the order of the page."""
    devices = gpu.gpus()
    asked: list[tuple[str, Check]] = [] if devices else _without_gpu()
    for device in devices:
        asked.append((f"GPU {device.index}", partial(gpu.check_gpu, device)))
        asked.append((f"link {device.index}", partial(gpu.check_link, device)))
    return [
        *asked,
        ("tuning", partial(gpu.check_tuning, devices[0] if devices else None)),
        ("NUMA", partial(memory.check_numa, devices)),
        ("memory", memory.check_memory),
        ("memory lock", partial(memory.check_lock, devices)),
        ("huge pages", memory.check_huge_pages),
        ("disk", partial(drive.check_drive, disk_path)),
        ("vLLM", versions.check_vllm),
        ("torch", versions.check_torch),
        ("Triton", partial(versions.check_triton, bool(devices))),
        ("restarts", versions.check_restarts),
    ]


def table(findings: list[Finding]) -> str:
    """For a person's eyes: a line each, and one more for what to do."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict.value:4}  {finding.subject:{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"{'':4}  {'':{width}}  -> {finding.advice}")
    return "\n".join(lines)


def _without_gpu() -> list[tuple[str, Check]]:
    unseen = [
        (subject, partial(Finding, subject, Verdict.UNSEEN, gpu.NO_GPU))
        for subject in ("PCIe", "link")
    ]
    return [("GPU", gpu.check_no_gpu), *unseen]


@contextmanager
def _silence() -> Iterator[None]:
    """What KVortex logs of a machine is what the checks tell of it."""
    logger = logging.getLogger("kvortex")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
