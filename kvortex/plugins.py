"""Finds an eviction policy by the name under which a package registered it."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from kvortex.core import ConfigError
from kvortex.policies import ADMISSIONS, BUILT_IN

if TYPE_CHECKING:
    from kvortex.policies import AdmissionFilter, EvictionPolicy

GROUP = "kvortex.policies"


def policy_names() -> list[str]:
    """Every name that `load_policy` accepts, sorted."""
    return sorted(BUILT_IN.keys() | {entry.name for entry in entry_points(group=GROUP)})


def load_policy(name: str, capacity: int) -> EvictionPolicy:
    """Make the policy registered as `name` for a tier of `capacity` blocks.

    Raises:
        ConfigError: nobody registered the name, two packages did, or the policy cannot be made.
    """
    registered = {entry.value: entry for entry in entry_points(group=GROUP, name=name)}
    if len(registered) > 1:
        raise ConfigError(
            f"eviction_policy={name!r}: registered twice, as {' and '.join(sorted(registered))}; "
            "uninstall one of the packages"
        )
    if registered:
        return _make(next(iter(registered.values())), capacity)
    if name in BUILT_IN:  # a checkout that is only on PYTHONPATH has no entry points
        return BUILT_IN[name](capacity)
    raise ConfigError(f"eviction_policy={name!r}: not installed; use {', '.join(policy_names())}")


def load_admission(name: str, capacity: int) -> AdmissionFilter:
    """Make the admission filter of this name for a tier of `capacity` blocks.

    Raises:
        ConfigError: there is none.
    """
    if name not in ADMISSIONS:
        raise ConfigError(f"admission={name!r}: unknown; use {', '.join(sorted(ADMISSIONS))}")
    return ADMISSIONS[name](capacity)


def _make(entry: EntryPoint, capacity: int) -> EvictionPolicy:
    try:
        policy: EvictionPolicy = entry.load()(capacity)
    except Exception as error:
        raise ConfigError(
            f"eviction_policy={entry.name!r}: {entry.value} cannot be used "
            f"({type(error).__name__}: {error}); use {', '.join(sorted(BUILT_IN))}"
        ) from error
    missing = [verb for verb in ("insert", "hit", "evict", "remove") if not hasattr(policy, verb)]
    if missing:
        raise ConfigError(
            f"eviction_policy={entry.name!r}: {entry.value} lacks {', '.join(missing)}; "
            "derive it from kvortex.policies.EvictionPolicy"
        )
    return policy
