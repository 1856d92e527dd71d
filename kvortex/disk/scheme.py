"""Scheme: how the checksums in one cache's records were made; kept as JSON beside the cache."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from kvortex.checksum import WORD, seed_of

if TYPE_CHECKING:
    from kvortex.core import BlockKey

OWN_KIND, SEEDED, SUMS = "xxh3", "xxh3 seeded", "sum of words of {} bytes"
WORDS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a record's checksum depends on beside bytes and key.

    One of the disk's own is of the bytes alone. All others are those of host slots: see
    `Verification`, of which `word` and `stretches` are kept where a GPU counts them.
    """

    kind: str = OWN_KIND
    fingerprint: int = 0
    word: int = 0
    stretches: tuple[tuple[int, int], ...] = ()

    @classmethod
    def read(cls, told: object, slot_bytes: int) -> Self | None:
        """From what `as_dict` told; None if nobody can count such checksums of such slots."""
        if not isinstance(told, dict):
            return None
        kind: Any = told.get("kind")
        fingerprint: Any = told.get("fingerprint")
        word: Any = told.get("word")
        if not isinstance(kind, str) or not _is_number(fingerprint, -WORD // 2, WORD // 2):
            return None
        if kind in {OWN_KIND, SEEDED}:
            return cls(kind, fingerprint)
        stretches = _stretches(told.get("stretches"), word, slot_bytes)
        if word not in WORDS or kind != SUMS.format(word) or stretches is None:
            return None
        return cls(kind, fingerprint, word, stretches)

    def as_dict(self) -> dict[str, Any]:
        """Name to value, for JSON."""
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "word": self.word,
            "stretches": self.stretches,
        }

    @property
    def identity(self) -> bytes:
        """Where it differs, checksums of the same bytes may."""
        return f"{self.kind} {self.fingerprint}".encode()

    def seed(self, key: BlockKey) -> int:
        """What the checksum of a key's bytes starts from; of 64 bits, with a sign."""
        return 0 if self.kind == OWN_KIND else seed_of(key) ^ self.fingerprint


def _stretches(told: object, word: object, slot_bytes: int) -> tuple[tuple[int, int], ...] | None:
    """Of whole words, one behind the other, in a slot."""
    if type(word) is not int or word not in WORDS or not isinstance(told, list):
        return None
    for one in told:
        if not isinstance(one, list) or len(one) != 2:
            return None
        if not all(_is_number(n, 0, slot_bytes + 1) and n % word == 0 for n in one):
            return None
    found = tuple((offset, nbytes) for offset, nbytes in told)
    ends = [offset + nbytes for offset, nbytes in found]
    apart = all(end <= after[0] for end, (_, after) in zip(ends, pairwise(found), strict=False))
    return found if apart and max(ends, default=0) <= slot_bytes else None


def _is_number(told: object, least: int, end: int) -> bool:
    return type(told) is int and least <= told < end


OWN = Scheme()
"""The disk hashes what it writes, by itself."""
