"""Options for the settings of KVortexConfig, for the commands that take them."""

from __future__ import annotations

import argparse

from kvortex.config import KVortexConfig
from kvortex.plugins import load_admission, load_policy


def settings_parser(without: str = "", **defaults: float) -> argparse.ArgumentParser:
    """One option for each setting but one; their values are checked by KVortexConfig."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("settings of KVortex")
    for name, field in KVortexConfig.model_fields.items():
        if name == without:
            continue
        default = defaults.get(name, field.default)
        group.add_argument(
            "--" + name.replace("_", "-"),
            default=default,
            metavar=name.rpartition("_")[2].upper(),
            help=f"{field.description} (default: {'none' if default is None else default})",
        )
    return parser


def read_config(arguments: argparse.Namespace) -> KVortexConfig:
    """The configuration that was asked for.

    Raises:
        ConfigError: a value that cannot be used, or a policy that is not installed.
    """
    config = KVortexConfig(
        **{name: getattr(arguments, name) for name in KVortexConfig.model_fields}
    )
    load_policy(config.eviction_policy, capacity=1)
    load_admission(config.admission, capacity=1)
    return config
