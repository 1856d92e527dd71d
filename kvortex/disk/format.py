"""What is on the disk: the record of a slot, checksums, and what tells one cache from another.

A record is 128 bytes that say whose bytes a slot holds. It carries a tag of the cache and of the
rank it belongs to, its own slot's number, and a checksum of itself: one that was torn, moved or
made by somebody else is no record.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from kvortex.core import MAX_KEY_BYTES
from kvortex.disk.scheme import OWN

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from kvortex.core import BlockIds, BlockKey
    from kvortex.disk.scheme import Scheme

FORMAT = "kvortex-disk-2"
MAGIC = b"KVXSLOT2"
PAGE = 4096
"""What O_DIRECT wants memory, offsets and lengths to be multiples of, on every drive we know."""
RECORD_BYTES = 128
NO_RECORD = bytes(RECORD_BYTES)

_FIELDS = struct.Struct("<8s8sQQQQII64s")
_TABLE = np.dtype(
    [
        ("magic", "<u8"),
        ("tag", "<u8"),
        ("slot", "<u8"),
        ("generation", "<u8"),
        ("checksum", "<u8"),
        ("written_at", "<u8"),
        ("slot_bytes", "<u4"),
        ("key_bytes", "<u4"),
        ("key", "V64"),
        ("own_checksum", "<u8"),
    ]
)
_NEWEST = 1 << 62
"""A generation past it was not given by us: numbers must stay countable."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """What the bytes of a cache depend on: where `identity` differs they are never mixed.

    `description` says the same to people; it is kept beside the cache as JSON.
    """

    identity: bytes
    description: Mapping[str, str | int | float]

    def digest(self, slot_bytes: int, scheme: Scheme = OWN) -> bytes:
        """16 bytes that name the cache of blocks of `slot_bytes` with checksums of a scheme."""
        parts = (f"{FORMAT} {slot_bytes}".encode(), scheme.identity, self.identity)
        told = b" ".join(parts)
        return blake2b(told, digest_size=16).digest()


class Record(NamedTuple):  # made at half the cost of a frozen dataclass, for each block that moves
    """Whose bytes a slot holds. Of two records with one key the larger generation is the newer."""

    key: BlockKey
    generation: int
    checksum: int
    """Of the bytes: see `Scheme`; without a sign."""
    written_at: int
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Survivors:
    """What was found on the disk at start: `keys[i]` in slot `slots[i]`, each key once."""

    slots: BlockIds
    keys: list[BlockKey]
    generations: BlockIds
    written_at: BlockIds
    stale: BlockIds
    """Slots whose key was written again elsewhere, later."""
    invalid: int = 0
    """Records that were torn, moved, or somebody else's."""


class RecordFormat:
    """Packs and reads the records of one rank's cache, named by its namespace's digest."""

    def __init__(self, digest: bytes, rank: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._tag = blake2b(digest + rank.to_bytes(8, "little"), digest_size=8).digest()

    def pack(self, slot: int, record: Record) -> bytes:
        """The record as 128 bytes."""
        key = record.key
        fields = _FIELDS.pack(
            MAGIC,
            self._tag,
            slot,
            record.generation,
            record.checksum,
            record.written_at,
            self.slot_bytes,
            len(key),
            key,
        )
        return fields + xxh3_64_intdigest(fields).to_bytes(8, "little")

    def read_table(self, packed: memoryview) -> Survivors:
        """The valid records of a whole table; a key in several slots counts in its newest."""
        table = np.frombuffer(packed, _TABLE)
        numbers = np.arange(len(table), dtype=np.uint64)
        plausible = self._is_ours(table)
        plausible &= (table["slot"] == numbers) & (table["generation"] < _NEWEST)
        plausible &= table["slot_bytes"] == self.slot_bytes
        plausible &= (table["key_bytes"] >= 1) & (table["key_bytes"] <= MAX_KEY_BYTES)
        slots = np.flatnonzero(plausible)
        slots = slots[[self._is_whole(packed, slot) for slot in slots.tolist()]]
        return _newest(table, slots, len(_written(packed)) - len(slots))

    def told_slot_bytes(self, packed: memoryview) -> int | None:
        """What the records of this cache and rank say of a slot's size, whatever was said to us;
        None if there are none."""
        table = np.frombuffer(packed, _TABLE)
        for slot in np.flatnonzero(self._is_ours(table)).tolist():
            if self._is_whole(packed, slot):
                return int(table["slot_bytes"][slot])
        return None

    def damaged(self, packed: memoryview) -> list[int]:
        """Slots whose records are torn or another slot's; whole ones of other caches are not."""
        table = np.frombuffer(packed, _TABLE)
        moved = self._is_ours(table)
        moved &= table["slot"] != np.arange(len(table), dtype=np.uint64)
        slots = _written(packed).tolist()
        return [slot for slot in slots if moved[slot] or not self._is_whole(packed, slot)]

    def _is_ours(self, table: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        """Of each slot, whether its record says that it is of this cache and rank."""
        ours: npt.NDArray[np.bool_] = table["tag"] == int.from_bytes(self._tag, "little")
        ours &= table["magic"] == int.from_bytes(MAGIC, "little")
        return ours

    @staticmethod
    def _is_whole(packed: memoryview, slot: int) -> bool:
        start = slot * RECORD_BYTES
        end = start + RECORD_BYTES
        own = int.from_bytes(packed[end - 8 : end], "little")
        return xxh3_64_intdigest(packed[start : end - 8]) == own


def _written(packed: memoryview) -> BlockIds:
    """Slots in the places of whose records there is anything."""
    return np.flatnonzero(np.frombuffer(packed, "<u8").reshape(-1, RECORD_BYTES // 8).any(axis=1))


def checksum_in(table: bytes | bytearray, slot: int, key: BlockKey) -> int | None:
    """Of a slot's bytes, if its record is this key's; found in a third of what `peek` takes."""
    magic, _, _, _, checksum, _, _, key_bytes, found = _FIELDS.unpack_from(
        table, slot * RECORD_BYTES
    )
    return checksum if magic == MAGIC and found[:key_bytes] == key else None


def peek(table: bytes | bytearray, slot: int) -> Record | None:
    """The record of a slot, in a table in which every record is known to be valid or away."""
    magic, _, _, generation, checksum, written_at, _, key_bytes, key = _FIELDS.unpack_from(
        table, slot * RECORD_BYTES
    )
    return Record(key[:key_bytes], generation, checksum, written_at) if magic == MAGIC else None


def _newest(table: npt.NDArray[np.void], slots: BlockIds, invalid: int) -> Survivors:
    """Leave one slot to each key."""
    rows = table[slots]
    order = np.argsort(rows["generation"], kind="stable")
    slots, rows = slots[order], rows[order]
    lengths = rows["key_bytes"].tolist()
    keys = [key[:n] for key, n in zip(_raw_keys(rows), lengths, strict=True)]
    last = {key: place for place, key in enumerate(keys)}
    kept = np.fromiter(last.values(), np.int64, len(last))
    return Survivors(
        slots[kept],
        list(last),
        rows["generation"][kept].astype(np.int64),
        rows["written_at"][kept].astype(np.int64),
        np.delete(slots, kept),
        invalid,
    )


def _raw_keys(rows: npt.NDArray[np.void]) -> list[bytes]:
    keys = np.ascontiguousarray(rows["key"]).tobytes()
    return [keys[start : start + 64] for start in range(0, len(keys), 64)]


def stride(slot_bytes: int) -> int:
    """Bytes from one slot's start in the file to the next one's."""
    return -(-slot_bytes // PAGE) * PAGE
