"""The checksum of a block in host memory where the CPU counts it, and what each one starts from.

A block is cut into pieces, each with a digest of its own, so that several threads may read one.
On a GPU the kernel that moves the block sums it up instead (`triton_kernels.paged_copy`).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

if TYPE_CHECKING:
    from kvortex.core import BlockKey

    Digests = list[int]

PIECE_BYTES = 512 << 10
WORD = 1 << 64
UNCOUNTED = 0
"""Instead of the checksums of parts of a block of which only that of the whole is known."""


def seed_of(key: BlockKey) -> int:
    """What the checksum of a key's bytes starts from: right bytes under a wrong key are wrong.

    A signed number of 64 bits, as all checksums in arrays are.
    """
    return signed(xxh3_64_intdigest(key))


def checksum_of(block: memoryview, seed: int = 0) -> int:
    """The checksum of a block, without a sign.

    Args:
        block: its bytes.
        seed: of 64 bits, signed or not.
    """
    digests = [0] * num_pieces(len(block))
    digest_pieces(block, digests, 0, len(digests))
    return combine(digests, seed)


def num_pieces(nbytes: int) -> int:
    """How many pieces of a block have a digest of their own."""
    return -(-nbytes // PIECE_BYTES)


def digest_pieces(block: memoryview, digests: Digests, first: int, end: int) -> None:
    """Put the digests of pieces `first` to `end` of a block in their places; frees the GIL."""
    for piece in range(first, end):
        part = block[piece * PIECE_BYTES : (piece + 1) * PIECE_BYTES]
        digests[piece] = xxh3_64_intdigest(part)


def combine(digests: Digests, seed: int = 0) -> int:
    """The checksum of a block, without a sign, from the digests of all of its pieces."""
    return xxh3_64_intdigest(struct.pack(f"<{len(digests)}Q", *digests), seed % WORD)


def signed(number: int) -> int:
    """A number of 64 bits as int64 has it."""
    return (number + WORD // 2) % WORD - WORD // 2
