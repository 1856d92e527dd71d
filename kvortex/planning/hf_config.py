"""HFConfig: a Hugging Face config.json, or the part of one that describes the text model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from kvortex.core import ConfigError, shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

LARGEST_FILE = 64 << 20
DEEPEST = 64
"""Levels in such a file."""
LARGEST_NUMBER = 1 << 20
"""No model has more of anything that is read here; where it has a wider window, that is none."""
TEXT_PARTS = ("thinker_config", "text_config", "llm_config", "language_config")
"""Where multimodal models keep their text model."""
CLASS_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
    },
    "mistral": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "gemma": {
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
    },
    "gemma2": {
        "num_hidden_layers": 26,
        "hidden_size": 2304,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
    },
    "gemma3_text": {
        "num_hidden_layers": 26,
        "hidden_size": 2304,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
    },
    "mixtral": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "gpt_oss": {
        "num_hidden_layers": 36,
        "hidden_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
    },
}
"""What transformers takes where a config.json leaves it out, as those of nested models often do."""


class HFConfig:
    """`values` of one model, by the names of its config.json.

    Args:
        values: as read.
        name: for messages.
        root: of the whole file, where `values` is a part of it.
    """

    def __init__(
        self, values: Mapping[str, Any], name: str, root: Mapping[str, Any] | None = None
    ) -> None:
        self.name = name
        self.root = values if root is None else root
        self.model_type = text_of(values.get("model_type"))
        self.values: dict[str, Any] = {**CLASS_DEFAULTS.get(self.model_type, {}), **values}

    def text(self) -> HFConfig:
        """The part that describes the text model: all of it, or what is nested in it."""
        for part in TEXT_PARTS:
            inner = self.values.get(part)
            if isinstance(inner, dict) and inner:
                return HFConfig(inner, self.name, self.root).text()
        return self

    def has(self, key: str) -> bool:
        """Whether it says anything of `key` but null, no, nothing and none."""
        return self.values.get(key) not in (None, False, 0, [], {}, "")

    def number(self, *names: str) -> int | None:
        """A positive whole number by the first of its names that is there; None if none is.

        Raises:
            ConfigError: it is something else.
        """
        for key in names:
            value = self.values.get(key)
            if value is None:
                continue
            if type(value) is not int or not 1 <= value <= LARGEST_NUMBER:
                most = f"a whole number from 1 to {LARGEST_NUMBER}"
                raise ConfigError(f"{self.name}: {key}={shown(value)} is not {most}")
            return value
        return None

    def required(self, *names: str) -> int:
        """The same where it must be there.

        Raises:
            ConfigError: it is not, or something else.
        """
        found = self.number(*names)
        if found is None:
            kind = f"model_type {self.model_type!r}" if self.model_type else "no model_type"
            raise ConfigError(
                f"{self.name}: {names[0]} is not in it ({kind}); KVortex does not know the KV "
                "cache of such a model"
            )
        return found


def read_hf_config(path: Path) -> HFConfig:
    """Read a config.json, or the one in a folder.

    Raises:
        ConfigError: there is none, or it is not one.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        with file.open("rb") as opened:
            packed = opened.read(LARGEST_FILE)
        values = json.loads(packed)
    except FileNotFoundError:
        what = "no config.json in this folder" if file != path else "no such file or folder"
        raise ConfigError(
            f"{path}: {what}; name a model's folder or its config.json, downloaded before"
        ) from None
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{file}: this is no JSON; name a model's config.json") from None
    if not isinstance(values, dict) or not _is_shallow(values):
        raise ConfigError(f"{file}: this is no JSON object; name a model's config.json")
    return HFConfig(values, str(file))


def text_of(value: object) -> str:
    """A word, empty where it is none."""
    return value if isinstance(value, str) else ""


def _is_shallow(values: dict[str, Any]) -> bool:
    """Whether it can be looked into without an end of Python's stack."""
    level: list[Any] = [values]
    for _ in range(DEEPEST):
        lists = [value.values() if isinstance(value, dict) else value for value in level]
        level = [inner for inners in lists for inner in inners if isinstance(inner, dict | list)]
        if not level:
            return True
    return False
