"""The alert rules, by Prometheus's own test runner: quiet while all is well, loud where not."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

DASHBOARDS = Path(__file__).parent.parent / "dashboards"
PROMTOOL = shutil.which("promtool")


def test_every_rule_is_tested_to_fire() -> None:
    rules = set(re.findall(r"- alert: (\w+)", (DASHBOARDS / "alerts.yml").read_text()))
    told = (DASHBOARDS / "alerts_test.yml").read_text()
    assert rules == set(re.findall(r'alertname="(\w+)"', told))


@pytest.mark.skipif(PROMTOOL is None, reason="promtool comes with Prometheus, which is not here")
def test_rules_fire_when_they_should_and_not_before() -> None:
    assert PROMTOOL is not None
    command = [PROMTOOL, "test", "rules", "alerts_test.yml"]
    done = subprocess.run(command, cwd=DASHBOARDS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
