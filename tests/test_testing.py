"""The contract that is shipped: it passes what is right, and finds each way of being wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvortex.policies import BUILT_IN, LRU
from kvortex.testing import check_policy

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLE = Path(__file__).parent.parent / "examples" / "kvortex-clock"


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("seed", [0, 1])
def test_built_in_policies_keep_the_contract(name: str, seed: int) -> None:
    check_policy(BUILT_IN[name], seed)


class NamesPinned(LRU):
    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        return super().evict(lambda key: False)


class Forgets(LRU):
    def remove(self, key: bytes) -> None: ...


class GivesUp(LRU):
    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        first = next(iter(self._order), None)
        return None if first is None or pinned(first) else super().evict(pinned)


class Keeps(LRU):
    def evict(self, pinned: Callable[[bytes], bool]) -> bytes | None:
        return next((key for key in self._order if not pinned(key)), None)


class Raises(LRU):
    def hit(self, key: bytes) -> None:
        raise KeyError(key)


class Asserts(LRU):
    def insert(self, key: bytes) -> None:
        assert not key, "never so"


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (NamesPinned, "which is pinned"),
        (Forgets, "not resident"),
        (GivesUp, "found no victim among"),
        (Keeps, "not resident|had evicted"),
        (Raises, r"hit raised KeyError\(b'.*'\)"),
        (Asserts, "insert raised AssertionError"),
    ],
)
def test_a_policy_that_is_wrong_is_found(wrong: type[LRU], complaint: str) -> None:
    with pytest.raises(
        AssertionError, match=rf"{wrong.__name__}\(\d+\), step \d+: .*({complaint})"
    ):
        check_policy(wrong)


class Unmade(LRU):
    def __init__(self, capacity: int) -> None:
        raise ValueError("too small")


def test_a_policy_that_cannot_be_made_is_named() -> None:
    with pytest.raises(AssertionError, match=r"Unmade\(1\) raised ValueError\('too small'\)"):
        check_policy(Unmade)


def test_the_example_is_installed_checked_and_chosen_by_name(tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    install += ["--no-build-isolation", "--disable-pip-version-check", "--target", str(tmp_path)]
    subprocess.run([*install, str(EXAMPLE)], check=True, capture_output=True)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_clock.py"]
    subprocess.run(test, cwd=EXAMPLE, env=env, check=True, capture_output=True)
    config = [sys.executable, "-m", "kvortex", "config", "--eviction-policy", "clock"]
    done = subprocess.run(config, env=env, check=True, capture_output=True, text=True)
    assert '"eviction_policy": "clock"' in done.stdout


def test_the_example_is_short() -> None:
    files = [file for file in EXAMPLE.iterdir() if file.suffix in (".py", ".toml")]
    assert len(files) == 3
    assert sum(len(file.read_text().splitlines()) for file in files) < 60
