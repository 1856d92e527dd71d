"""What a file, an option or a client may say: anything, and valid documents with a few mistakes."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from kvortex.core import KVortexError

if TYPE_CHECKING:
    from collections.abc import Iterator

LONGEST_MESSAGE = 1000

WORDS = st.text(max_size=20) | st.sampled_from(
    ["two\nlines", "\x1b[2J", "\ud800", "a\0b", "nan", "1e999", "-0", "9" * 400, "%s{0}", "/" * 300]
)
NUMBERS = (
    st.integers(-3, 70)
    | st.sampled_from([1 << 20, 1 << 31, 1 << 53, 1 << 64, -(1 << 63), 10**400])
    | st.floats()
    | st.integers()
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)
"""Whatever JSON can carry, and what Python makes of it."""


@st.composite
def spoiled(draw: st.DrawFn, document: Any) -> Any:
    """The document, with up to three of its values gone, added or replaced by any."""
    whole = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        place = whole
        while place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.integers(0, 3)) == 0:
                del place[key]
            else:
                place[key] = draw(VALUES)
            break
        if isinstance(place, dict) and draw(st.integers(0, 5)) == 0:
            place[draw(WORDS)] = draw(VALUES)
    return whole


@st.composite
def spoiled_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes, with up to four stretches of up to eight replaced, and perhaps cut off."""
    found = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(found)))
        found[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(found[: draw(st.none() | st.integers(0, len(found)))])


def packed(document: Any) -> bytes:
    """As a file of JSON."""
    return json.dumps(document).encode()


def is_one_line(message: str) -> bool:
    """Whether it can be shown to a person as it is."""
    return message.isprintable() and 0 < len(message) <= LONGEST_MESSAGE


@contextmanager
def perhaps_refused() -> Iterator[None]:
    """The only errors that may come out are ours, of one line."""
    refusal = "nothing"
    try:
        yield
    except KVortexError as error:
        refusal = str(error)
    assert is_one_line(refusal), refusal
