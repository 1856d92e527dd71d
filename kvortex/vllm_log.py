"""VllmLog: the file into which a vLLM that was started here writes, and what to tell of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

LINES_SHOWN = 25
REFUSAL = re.compile(r"KVortex cannot start: .*")


class VllmLog:
    """At `path`, which is not there before vLLM wrote something."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refusal(self) -> str | None:
        """The line in which KVortex refused to start, if it did."""
        found = REFUSAL.search(self._text())
        return found and found[0]

    def tail(self) -> str:
        """The last lines."""
        return "\n".join(self._text().splitlines()[-LINES_SHOWN:])

    def _text(self) -> str:
        return self.path.read_text(errors="replace") if self.path.exists() else ""
