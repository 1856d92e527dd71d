"""Recount: the checksum of a block from the disk, made anew on the CPU, whoever made the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvortex.checksum import WORD, checksum_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvortex.core import BlockKey
    from kvortex.disk.scheme import Scheme

PIECE_BYTES = 1 << 20
"""Of a stretch are summed up at once: torch takes eight times a word's bytes, and more."""


def recount(scheme: Scheme, key: BlockKey, block: memoryview) -> int:
    """Of a key's block, without a sign."""
    seed = scheme.seed(key)
    return _summed(scheme, block, seed) if scheme.word else checksum_of(block, seed)


def _summed(scheme: Scheme, block: memoryview, seed: int) -> int:
    import torch  # late, as only a GPU's checksums take it

    from kvortex.triton_kernels.reference import checksums_reference

    blocks, seeds = torch.frombuffer(block, dtype=torch.uint8)[None], torch.tensor([seed])
    return int(checksums_reference(blocks, _pieces(scheme), scheme.word, seeds)) % WORD


def _pieces(scheme: Scheme) -> Iterator[tuple[int, int]]:
    for offset, nbytes in scheme.stretches:
        for start in range(0, nbytes, PIECE_BYTES):
            yield offset + start, min(PIECE_BYTES, nbytes - start)
