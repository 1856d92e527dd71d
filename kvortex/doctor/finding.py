"""Finding: what one look at the machine found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


class Verdict(Enum):
    """Of a check."""

    OK = "ok"
    WARN = "warn"
    """It works, but less well than it could."""
    FAIL = "fail"
    """It will not work."""
    UNSEEN = "-"
    """It cannot be looked at here."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line for a person; `facts` are its numbers, for scripts."""

    subject: str
    verdict: Verdict
    found: str
    advice: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "subject": self.subject,
            "verdict": self.verdict.value,
            "found": self.found,
            "advice": self.advice,
            "facts": dict(self.facts),
        }
