"""Policies by name: the built-in ones, and those of packages that KVortex has never heard of."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from kvortex import ConfigError, KVortexConfig, KVortexEngine
from kvortex.plugins import GROUP, load_policy, policy_names
from kvortex.policies import BUILT_IN

Install = Callable[..., None]

THIRD_PARTY = """
from kvortex.policies import EvictionPolicy

class Newest(EvictionPolicy):
    def __init__(self, capacity):
        super().__init__(capacity)
        self.keys = []

    def insert(self, key):
        self.keys.append(key)

    def hit(self, key):
        pass

    def evict(self, pinned):
        free = [key for key in self.keys if not pinned(key)]
        if not free:
            return None
        self.keys.remove(free[-1])
        return free[-1]

    def remove(self, key):
        self.keys.remove(key)

def broken(capacity):
    raise OSError("no licence")

def half(capacity):
    class Half:
        insert = hit = lambda self, key: None
    return Half()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution of a module and its entry points, as pip would leave it."""

    def write(package: str = "fake", **policies: str) -> None:
        folder = tmp_path / package
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{package}_policies.py").write_text(THIRD_PARTY)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "".join(
            f"{name} = {package}_policies:{attribute}\n" for name, attribute in policies.items()
        )
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}")
        monkeypatch.syspath_prepend(folder)

    known = set(sys.modules)
    yield write
    for name in set(sys.modules) - known:
        if name.endswith("_policies"):
            del sys.modules[name]


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_by_name(name: str) -> None:
    assert type(load_policy(name, 7)) is BUILT_IN[name]


def test_built_in_are_the_registered_ones() -> None:
    """A checkout on PYTHONPATH and an installed package know the same names."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    registered = project["project"]["entry-points"][GROUP]
    assert {name: EntryPoint(name, at, GROUP).load() for name, at in registered.items()} == BUILT_IN


def test_third_party_policy_serves_an_engine(install: Install) -> None:
    install(newest="Newest")
    assert "newest" in policy_names()
    config = KVortexConfig(ram_pool_gb=2 * 16 / (1 << 30), eviction_policy="newest")
    blocks = torch.arange(4 * 16, dtype=torch.uint8).view(4, 16)
    with KVortexEngine(config, {"a": blocks}) as engine:
        for number in range(3):
            engine.save_blocks([bytes([number])], [number]).wait()
        assert engine.check_blocks([b"\0", b"\1", b"\2"]) == [True, False, True]


def test_unknown_name_lists_the_known_ones(install: Install) -> None:
    install(newest="Newest")
    with pytest.raises(ConfigError) as caught:
        load_policy("oldest", 7)
    assert str(caught.value) == (
        f"eviction_policy='oldest': not installed; use {', '.join(policy_names())}"
    )
    assert {"newest", *BUILT_IN} <= set(policy_names())
    assert policy_names() == sorted(policy_names())


def test_name_of_two_packages(install: Install) -> None:
    install("one", newest="Newest")
    install("two", newest="Newest")
    with pytest.raises(ConfigError) as caught:
        load_policy("newest", 7)
    message = str(caught.value)
    assert message.startswith("eviction_policy='newest': registered twice")
    assert "one_policies:Newest and two_policies:Newest" in message


def test_a_policy_that_cannot_be_made(install: Install) -> None:
    install(broken="broken")
    with pytest.raises(ConfigError) as caught:
        load_policy("broken", 7)
    message = str(caught.value)
    assert message.startswith("eviction_policy='broken': fake_policies:broken cannot be used")
    assert "OSError: no licence" in message
    assert "lru" in message
    assert isinstance(caught.value.__cause__, OSError)


def test_a_policy_that_is_not_there(install: Install) -> None:
    install(missing="Missing")
    with pytest.raises(ConfigError, match=r"'missing': fake_policies:Missing.*AttributeError"):
        load_policy("missing", 7)


def test_a_policy_that_lacks_verbs(install: Install) -> None:
    install(half="half")
    with pytest.raises(ConfigError, match="'half': fake_policies:half lacks evict, remove"):
        load_policy("half", 7)


def test_engine_of_unknown_policy_takes_no_memory() -> None:
    config = KVortexConfig(ram_pool_gb=60000, eviction_policy="nobody's")
    with pytest.raises(ConfigError, match='eviction_policy="nobody\'s": not installed'):
        KVortexEngine(config, {"a": torch.zeros(4, 16)})
