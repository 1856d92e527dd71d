"""Checksums: how blocks come by theirs on the way to disk and back, and who compares. On lanes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvortex.checksum import UNCOUNTED, WORD, checksum_of, combine, digest_pieces, signed
from kvortex.disk.scheme import OWN, SEEDED, SUMS, Scheme

if TYPE_CHECKING:
    from kvortex.checksum import Digests
    from kvortex.core import BlockKey
    from kvortex.host_pool import HostPool
    from kvortex.verification import Verification


def scheme_of(verification: Verification | None) -> Scheme:
    """How the records of a rank whose bytes are verified like this come by their checksums."""
    if verification is None or not verification.on:
        return OWN
    if not verification.by_gpu:
        return Scheme(SEEDED, verification.fingerprint)
    word = verification.word
    return Scheme(SUMS.format(word), verification.fingerprint, word, verification.stretches)


class Checksums:
    """Of one rank's records, made by its `scheme`.

    Where a slot of the pool has a checksum beside it, that one travels with the bytes: nothing is
    hashed on the way out. On the way back the CPU compares, or the GPU when it loads the block.

    Args:
        pool: whose blocks move.
        verification: how its checksums are made; None if it has none.
    """

    def __init__(self, pool: HostPool, verification: Verification | None) -> None:
        self.scheme = scheme_of(verification)
        self.compares = not self.scheme.word
        """Whether bytes are compared as they come; else they are when they are loaded."""
        on = verification is not None and verification.on
        # A memoryview: of single numbers it costs a third of numpy.
        self._beside = pool.checksums.numpy().data if on else None
        self._of_parts = pool.running_checksums[:-1].numpy()

    def of(self, host_slot: int, block: memoryview) -> int:
        """For the record of what is in a host slot."""
        if self._beside is None:
            return checksum_of(block)
        return int(self._beside[host_slot]) % WORD

    def digest(self, block: memoryview, digests: Digests, first: int, end: int) -> None:
        """Pieces `first` to `end` of a block have come."""
        if self.compares:
            digest_pieces(block, digests, first, end)

    def arrive(self, key: BlockKey, checksum: int, digests: Digests, host_slot: int) -> bool:
        """A whole block has come that should have this checksum; whether its bytes are right, as
        far as is known here."""
        if self.compares and combine(digests, self.scheme.seed(key)) != checksum:
            return False
        if self._beside is not None:
            self._beside[host_slot] = signed(checksum)
            self._of_parts[:, host_slot] = UNCOUNTED
        return True
