"""Calibration: kept by machine, found by page size, and never a reason not to start."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest
import torch

from kvortex import calibration
from kvortex.calibration import (
    STAGED,
    ZERO_COPY,
    Calibration,
    Choice,
    calibration_file,
    defaults,
    load_calibration,
    load_speeds,
    save_calibration,
)
from kvortex.core import Direction

if TYPE_CHECKING:
    from pathlib import Path

GPU = torch.device("cuda", 0)
SPEEDS = {Direction.STORE: 52.5, Direction.LOAD: 51.25}
MINE = Choice(ZERO_COPY, STAGED, from_bytes=1 << 25, busy_from_bytes=1 << 23, programs=4)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "machine_key", lambda device: f"gpu {device.index}")


def measured(*pages: int) -> Calibration:
    return Calibration({page: dict.fromkeys(Direction, MINE) for page in pages}, "measured")


@pytest.mark.parametrize(
    ("nbytes", "busy", "mover"),
    [
        (1, False, ZERO_COPY),
        ((1 << 25) - 1, False, ZERO_COPY),
        (1 << 25, False, STAGED),
        ((1 << 23) - 1, True, ZERO_COPY),
        (1 << 23, True, STAGED),
    ],
)
def test_the_border_depends_on_the_other_direction(nbytes: int, busy: bool, mover: str) -> None:
    assert MINE.mover(nbytes, busy) == mover


def test_what_was_kept_is_found_again() -> None:
    path = save_calibration(GPU, measured(4096, 65536), SPEEDS)
    found = load_calibration(GPU)
    assert found.choices == measured(4096, 65536).choices
    assert found.origin == str(path)


def test_another_machine_finds_the_defaults_and_keeps_the_first() -> None:
    save_calibration(GPU, measured(4096), SPEEDS)
    other = torch.device("cuda", 1)
    assert load_calibration(other) == defaults()
    save_calibration(other, measured(8192), SPEEDS)
    assert load_calibration(GPU).choices == measured(4096).choices


@pytest.mark.parametrize(
    ("page", "nearest"),
    [(1, 4096), (4096, 4096), (15_000, 4096), (17_000, 65536), (1 << 30, 65536)],
)
def test_the_nearest_page_size_decides(page: int, nearest: int) -> None:
    found = measured(4096, 65536)
    assert found.for_page(page) is found.choices[nearest]


def test_without_a_file_the_defaults_say_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    assert load_calibration(GPU) == defaults()
    assert "kvortex tune" in defaults().origin
    assert caplog.records == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "[" * 100_000,
        "{}",
        '{"gpu 0": []}',
        '{"gpu 0": {"4096": {"store": {}}}}',
        '{"gpu 0": {"a": {}}}',
        "\x00\xff",
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_ignored(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    calibration_file().parent.mkdir(parents=True)
    calibration_file().write_text(text)
    with caplog.at_level(logging.WARNING):
        assert load_calibration(GPU) == defaults()
    assert len(caplog.records) <= 1
    save_calibration(GPU, measured(4096), SPEEDS)
    assert load_calibration(GPU).choices == measured(4096).choices


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("small", "teleport"),
        ("programs", 0),
        ("programs", 8.5),
        ("programs", 99_999),
        ("programs", True),
        ("from_bytes", "much"),
        ("from_bytes", None),
        ("busy_from_bytes", -1),
    ],
)
def test_values_that_no_tune_writes_are_not_used(name: str, value: object) -> None:
    path = save_calibration(GPU, measured(4096), SPEEDS)
    stored = json.loads(path.read_text())
    stored["gpu 0"]["4096"]["load"][name] = value
    path.write_text(json.dumps(stored))
    assert load_calibration(GPU) == defaults()


@pytest.mark.parametrize("page", ["0", "-4", "9" * 400])
def test_page_sizes_that_cannot_be_are_not_used(page: str) -> None:
    path = save_calibration(GPU, measured(4096), SPEEDS)
    path.write_text(path.read_text().replace('"4096"', f'"{page}"'))
    assert load_calibration(GPU) == defaults()


def test_a_user_without_a_home_gets_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert load_calibration(GPU) == defaults()


@pytest.mark.parametrize("page", [1, 4 << 10, 256 << 10, 2 << 20])
def test_defaults_stage_pages_of_any_size(page: int) -> None:
    chosen = defaults().for_page(page)
    assert {choice.large for choice in chosen.values()} == {STAGED}


def test_speeds_are_kept_beside_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    save_calibration(torch.device("cuda", 1), measured(4096), dict.fromkeys(Direction, 9.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_speeds() is None
    save_calibration(GPU, measured(4096), SPEEDS)
    assert load_speeds() == SPEEDS
    assert load_calibration(GPU).choices == measured(4096).choices


@pytest.mark.parametrize("kept", ["", "[]", '{"GB/s": 1}', '{"GB/s": {"gpu 0": {"load": -1}}}'])
def test_speeds_that_cannot_be_read_are_none(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path = calibration_file()
    path.parent.mkdir(parents=True)
    path.write_text(kept)
    assert load_speeds() is None
