"""`kvortex doctor`: what it sees of this machine, and what it makes of others."""

from __future__ import annotations

import errno
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from kvortex.cli import main
from kvortex.config import GIB
from kvortex.doctor import drive, gpu, memory, versions
from kvortex.doctor.checkup import checks, run, table
from kvortex.doctor.drive import check_drive
from kvortex.doctor.finding import Finding, Verdict
from kvortex.doctor.gpu import Speeds, gpus, judge_link, judge_speed
from kvortex.doctor.pcie import PcieLink, link_now, link_possible

GEN5, GEN4 = PcieLink(32.0, 16), PcieLink(16.0, 16)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less is written to the disk."""
    monkeypatch.setattr(drive, "SIZE", 32 << 20)


def test_a_page_has_a_line_for_each_subject(
    little: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor", "--disk-path", str(tmp_path)])
    shown = capsys.readouterr()
    subjects = [subject for subject, _ in checks(None)]
    lines = shown.out.splitlines()
    for subject in subjects:
        assert any(re.match(rf"(ok|warn|fail|-) +{subject}\b", line) for line in lines)
    assert shown.err == ""  # no terminal, no progress
    assert list(tmp_path.iterdir()) == []


def test_json_says_what_was_measured(
    little: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["doctor", "--disk-path", str(tmp_path), "--json"])
    page = json.loads(capsys.readouterr().out)
    by_subject = {finding["subject"]: finding for finding in page["findings"]}
    verdicts = {finding["verdict"] for finding in page["findings"]}
    assert verdicts <= {"ok", "warn", "fail", "-"}
    assert page["ok"] == (code == 0) == ("fail" not in verdicts)
    assert by_subject["disk"]["facts"]["read_gb_s"] > 0
    assert by_subject["disk"]["facts"]["write_gb_s"] > 0
    assert by_subject["memory"]["facts"]["free_bytes"] > 0
    assert by_subject["torch"]["found"].startswith(torch.__version__)


def test_something_that_fails_is_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--disk-path", str(tmp_path / "missing")]) == 1
    assert f"mkdir -p {tmp_path}/missing" in capsys.readouterr().out


def test_a_file_in_the_place_of_the_folder_is_not_to_be_made_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    finding = check_drive(file)
    assert (finding.verdict, finding.found) == (Verdict.FAIL, f"{file}: Not a directory")
    assert finding.advice == "name a folder of a local drive that you may write to"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_cannot_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {each["subject"]: each["verdict"] for each in findings}["GPU"] in {"warn", "fail"}
    unseen = {each["subject"] for each in findings if each["verdict"] == "-"}
    assert {"PCIe", "link", "tuning", "disk"} <= unseen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_and_its_link_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    by_subject = {finding["subject"]: finding for finding in findings}
    name = torch.cuda.get_device_properties(0).name
    assert by_subject["GPU 0"]["facts"]["name"] == name
    assert by_subject["link 0"]["facts"]["store_gb_s"] > 1
    assert by_subject["link 0"]["facts"]["load_gb_s"] > 1
    assert len([each for each in findings if each["subject"].startswith("GPU")]) == len(gpus())


def test_no_gpu_is_a_warning_that_scripts_can_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "DRIVER", tmp_path / "no driver")
    finding = gpu.check_no_gpu()
    assert finding.verdict is Verdict.WARN
    assert finding.found == "no NVIDIA GPU that torch can use: there is no NVIDIA driver"


def test_a_check_that_fails_itself_is_a_finding() -> None:
    def broken() -> Finding:
        raise LookupError("no such thing\nat all")

    (finding,) = run("thing", broken)
    assert finding.verdict is Verdict.UNSEEN
    assert finding.found == "cannot be looked at: LookupError: no such thing"


def test_what_to_do_is_on_a_line_of_its_own() -> None:
    findings = [Finding("one", Verdict.OK, "fine"), Finding("other", Verdict.WARN, "bad", "do it")]
    assert table(findings).splitlines() == [
        "ok    one    fine",
        "warn  other  bad",
        "             -> do it",
    ]


def card(folder: Path, **told: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in told.items():
        (folder / name).write_text(text + "\n")
    return folder


def test_a_link_is_read_from_both_its_ends(tmp_path: Path) -> None:
    root = card(tmp_path / "port", max_link_speed="16.0 GT/s PCIe", max_link_width="16")
    gpu = card(
        root / "gpu",
        max_link_speed="32.0 GT/s PCIe",
        max_link_width="16",
        current_link_speed="2.5 GT/s PCIe",
        current_link_width="8",
    )
    assert link_possible(gpu) == GEN4
    assert link_now(gpu) == PcieLink(2.5, 8)
    assert str(GEN4) == "PCIe 4 x16"


def test_a_link_that_is_not_told_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown"):
        link_now(card(tmp_path, current_link_speed="Unknown", current_link_width="0"))


@pytest.mark.parametrize(
    ("link", "gb_s"),
    [(PcieLink(8.0, 16), 15.75), (GEN4, 31.5), (GEN5, 63.0), (PcieLink(5.0, 8), 4.0)],
)
def test_what_a_link_carries(link: PcieLink, gb_s: float) -> None:
    assert link.gb_s == pytest.approx(gb_s, rel=0.001)


@pytest.mark.parametrize(
    ("now", "possible", "verdict"),
    [
        (GEN5, GEN5, Verdict.OK),
        (GEN4, GEN5, Verdict.WARN),
        (PcieLink(32.0, 8), GEN5, Verdict.WARN),
        (None, GEN5, Verdict.UNSEEN),
        (GEN5, None, Verdict.UNSEEN),
    ],
)
def test_a_link_is_judged_by_what_is_possible(
    now: PcieLink | None, possible: PcieLink | None, verdict: Verdict
) -> None:
    assert judge_link(0, now, possible).verdict is verdict


@pytest.mark.parametrize(
    ("speeds", "possible", "verdict"),
    [
        (Speeds(54.8, 55.4), GEN5, Verdict.OK),  # an H200
        (Speeds(54.8, 30.0), GEN5, Verdict.WARN),
        (Speeds(3.0, 55.4), GEN5, Verdict.FAIL),
        (Speeds(3.0, 3.0), None, Verdict.OK),
    ],
)
def test_a_link_is_judged_by_its_slower_way(
    speeds: Speeds, possible: PcieLink | None, verdict: Verdict
) -> None:
    assert judge_speed(0, speeds, possible).verdict is verdict


@pytest.mark.parametrize(
    ("free", "verdict"),
    [(9 * GIB, Verdict.OK), (7 * GIB, Verdict.WARN), (GIB // 2, Verdict.FAIL)],
)
def test_free_memory_is_judged_by_the_default_pool(free: int, verdict: Verdict) -> None:
    assert memory.check_memory(free).verdict is verdict


def test_a_lock_limit_without_a_gpu_is_told_but_not_judged() -> None:
    finding = memory.check_lock([], 8 << 20)
    assert (finding.verdict, finding.facts["limit_bytes"]) == (Verdict.UNSEEN, 8 << 20)
    assert memory.check_lock([], -1).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("setting", "verdict"),
    [
        ("always [madvise] never", Verdict.OK),
        ("[always] madvise never", Verdict.OK),
        ("always madvise [never]", Verdict.WARN),
        (None, Verdict.UNSEEN),
    ],
)
def test_huge_pages_are_judged_by_the_kernels_setting(
    setting: str | None, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "enabled"
    if setting is not None:
        file.write_text(setting + "\n")
    monkeypatch.setattr(memory, "HUGE_PAGES", file)
    assert memory.check_huge_pages().verdict is verdict


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_memory_is_no_drive(little: None) -> None:
    finding = check_drive(Path("/dev/shm"))
    assert finding.verdict is Verdict.WARN
    assert "tmpfs is no local drive" in finding.advice


def test_a_drive_without_nameless_files_is_left_as_clean(
    little: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return really_open(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)
    assert check_drive(tmp_path).facts["read_gb_s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_drive_that_may_not_be_written_to_fails() -> None:
    finding = check_drive(Path("/proc"))
    assert finding.verdict is Verdict.FAIL


def test_the_versions_of_vllm_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    (asked,) = project["project"]["optional-dependencies"]["vllm"]
    numbers = [tuple(map(int, pair)) for pair in re.findall(r"(\d+)\.(\d+)", asked)]
    assert numbers == [versions.OLDEST_VLLM, versions.TOO_NEW_VLLM]


@pytest.mark.parametrize(
    ("number", "verdict"),
    [("0.25.1", "fail"), ("0.26.0", "ok"), ("0.33.2", "ok"), ("0.34.0", "fail"), (None, "warn")],
)
def test_vllm_is_judged_by_its_version(
    number: str | None, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = None if number is None else ("vllm", number)
    monkeypatch.setattr(versions, "installed_vllm", lambda: found)
    assert versions.check_vllm().verdict.value == verdict


@pytest.mark.parametrize(
    ("number", "pins", "verdict"),
    [
        ("2.13.0+cpu", ["2.13.0"], Verdict.OK),
        ("2.13.0+cu130", ["2.13.0+cpu"], Verdict.OK),
        ("2.11.0", ["2.13.0"], Verdict.FAIL),
        ("2.11.0", [], Verdict.OK),
        (None, [], Verdict.FAIL),
    ],
)
def test_a_package_is_judged_by_what_asks_for_it(
    number: str | None, pins: list[str], verdict: Verdict
) -> None:
    assert versions.judge_pin("torch", number, pins, "vLLM").verdict is verdict


@pytest.mark.parametrize(
    ("seed", "vllm", "verdict"),
    [
        ("0", "0.26.0", Verdict.OK),
        (None, "0.26.0", Verdict.WARN),
        (None, "0.27.0", Verdict.OK),
        (None, None, Verdict.UNSEEN),
    ],
)
def test_restarts_depend_on_the_seed_before_vllm_0_27(
    seed: str | None, vllm: str | None, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if seed is not None:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    found = None if vllm is None else ("vllm", vllm)
    monkeypatch.setattr(versions, "installed_vllm", lambda: found)
    assert versions.check_restarts().verdict is verdict


def test_a_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("CC", "/no/such/compiler")
    assert versions.check_triton(has_gpu=True).verdict is Verdict.FAIL
    assert "no C compiler" in versions.check_triton(has_gpu=False).found
