"""Verification: how the bytes of one rank's blocks are checked from their store to their load."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

import numpy as np

from kvortex.core import Direction
from kvortex.layout import common_word

if TYPE_CHECKING:
    from kvortex.core import BlockIds
    from kvortex.layout import Layout

Verify = Literal["always", "sampled", "off"]
"""Which loads are compared with the checksum of what was stored."""
ONE_IN = 16
"""Loads of which one is compared if they are `sampled`; every store is summed up."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What a rank's checksums depend on beside bytes and key.

    `by_gpu` tells who counts them: the kernel that moves a block, over the words of `word` bytes in
    its `stretches` (offset in a slot and length, in bytes), or the CPU over a whole slot
    (`checksum_of`). Either starts from the key's seed xor `fingerprint`, a signed number of 64
    bits: blocks of another layout are wrong.
    """

    mode: Verify
    fingerprint: int
    by_gpu: bool
    word: int
    stretches: tuple[tuple[int, int], ...]

    @property
    def on(self) -> bool:
        """Whether there are checksums at all."""
        return self.mode != "off"


class Sampling:
    """Which copies are summed up: all stores, and of loads those that are to be compared.

    Once one was wrong, all are.
    """

    def __init__(self, verification: Verification | None) -> None:
        self._mode: Verify = verification.mode if verification is not None else "off"
        self._loads = 0

    def ways(self, direction: Direction) -> set[bool]:
        """What `next` may say."""
        if self._mode == "sampled" and direction is Direction.LOAD:
            return {True, False}
        return {self._mode != "off"}

    def found_wrong(self) -> None:
        """Of a load that was compared."""
        if self._mode == "sampled":
            self._mode = "always"

    def next(self, direction: Direction) -> bool:
        """Whether the next copy is summed up."""
        if self._mode == "sampled" and direction is Direction.LOAD:
            self._loads += 1
            return self._loads % ONE_IN == 1
        return self._mode != "off"


def seeds_from(seeds: BlockIds | None, count: int, verification: Verification | None) -> BlockIds:
    """What checksums start from: the seeds of keys, None for zeros, and the rank's fingerprint."""
    if seeds is None:
        seeds = np.zeros(count, np.int64)
    return seeds if verification is None else seeds ^ np.int64(verification.fingerprint)


def verification_of(layout: Layout, mode: Verify, namespace: bytes = b"") -> Verification:
    """For blocks of a layout, whose bytes also depend on what `namespace` names."""
    runs = layout.run_table()
    own = blake2b(layout.fingerprint() + namespace, digest_size=8).digest()
    stretches: list[tuple[int, int]] = []
    for offset, nbytes in sorted(runs[:, 2:].tolist()):
        if stretches and sum(stretches[-1]) == offset:
            stretches[-1] = (stretches[-1][0], stretches[-1][1] + nbytes)
        else:
            stretches.append((offset, nbytes))
    return Verification(
        mode,
        int.from_bytes(own, "little", signed=True),
        layout.device.type == "cuda",
        common_word(runs, layout.slot_bytes),
        tuple(stretches),
    )
