"""A hook of mkdocs that writes the reference from the code, so that the two cannot differ.

Pictures of measurements stay beside their rows; pages name them as a reader of the files would.

A page says `<!-- settings -->`, `<!-- other settings -->` or `<!-- commands -->` where they belong.
Runs in the process that builds the documentation.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from mkdocs.structure.files import File

from kvortex.cli import main
from kvortex.config import FROM_ELSEWHERE, LIMITS, KVortexConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from pydantic.fields import FieldInfo

RESULTS = Path(__file__).parent.parent / "bench" / "results"
COLUMNS = "72"
SUBCOMMAND = re.compile(r"^    ([a-z][\w-]*)(?:  |$)", re.MULTILINE)
WHAT_INSTEAD = {"value!r": "its value", "gib": "its GiB"}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Called by mkdocs when it has found the pages."""
    for picture in RESULTS.glob("*.png"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs for each page."""
    markdown = markdown.replace("(../bench/results/", "(results/")
    return re.sub(r"<!-- ([\w ]+) -->", lambda found: SECTIONS[found[1]](), markdown)


def settings() -> str:
    """A table of all settings."""
    rows = [_setting(name, field) for name, field in KVortexConfig.model_fields.items()]
    return "\n".join(["| setting | default | allowed | |", "|---|---|---|---|", *rows])


def other_settings() -> str:
    """A table of other connectors' settings, and what takes their place."""
    rows = []
    for name, hint in FROM_ELSEWHERE.items():
        for placeholder, meaning in WHAT_INSTEAD.items():
            hint = hint.replace(f"{{{placeholder}}}", f"<{meaning}>")  # noqa: PLW2901
        rows.append(f"| `{name}` | {_escaped(hint)} |")
    return "\n".join(["| setting | |", "|---|---|", *rows])


def commands() -> str:
    """What `--help` prints, of every command."""
    os.environ["COLUMNS"] = COLUMNS
    return "\n\n".join(f"## {name}\n\n```text\n{text}\n```" for name, text in _helps([]))


SECTIONS: dict[str, Callable[[], str]] = {
    "settings": settings,
    "other settings": other_settings,
    "commands": commands,
}


def _setting(name: str, field: FieldInfo) -> str:
    default = "none" if field.default is None else f"`{field.default}`"
    limits = [f"`{choice}`" for choice in get_args(field.annotation) if isinstance(choice, str)]
    limits += [
        f"{words} {getattr(limit, word)}"
        for limit in field.metadata
        for word, words in LIMITS.items()
        if hasattr(limit, word)
    ]
    return f"| `{name}` | {default} | {', '.join(limits)} | {_escaped(field.description or '')} |"


def _helps(words: list[str]) -> Iterator[tuple[str, str]]:
    """Of a command, then of those below it."""
    text = _help(words)
    yield " ".join(["kvortex", *words]), text
    if "COMMAND" in text.partition("\n\n")[0]:
        below = text.partition("COMMAND\n")[2].partition("\n\n")[0]
        for name in SUBCOMMAND.findall(below):
            yield from _helps([*words, name])


def _help(words: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return printed.getvalue().strip()


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
