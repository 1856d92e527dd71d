"""The kernel in plain torch: what it must equal, and for the copy alone the CPU's path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xFF51AFD7ED558CCD - (1 << 64)
SECOND = 0xC4CEB9FE1A85EC53 - (1 << 64)
"""As in the kernel; torch counts in signed numbers."""


def paged_copy_reference(
    pages: Iterable[tuple[torch.Tensor, int]],
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    host: torch.Tensor,
    *,
    store: bool,
) -> None:
    """Copy blocks between KV memory and host slots.

    Args:
        pages: per layer, on any one device, a uint8 view (num_blocks, *runs, run_bytes) and its
            offset in a slot.
        block_ids: int64 (n,).
        slots: int64 (n,), the slot of each block.
        host: uint8 (num_slots, slot_bytes).
        store: from KV memory to host slots if true, back if false.
    """
    with torch.inference_mode():  # vLLM's KV tensors on the CPU are inference tensors
        for view, offset in pages:
            ids = block_ids.to(view.device)
            nbytes = view[0].numel()
            part = slice(offset, offset + nbytes)
            if store:
                host[slots, part] = view[ids].reshape(len(ids), nbytes).to(host.device)
            else:
                view[ids] = host[slots, part].to(view.device).reshape(len(ids), *view.shape[1:])


def clear_blocks(pages: Iterable[torch.Tensor], block_ids: list[int]) -> None:
    """Leave zeros in these blocks; `pages` are views as above."""
    with torch.inference_mode():
        for view in pages:
            view[torch.tensor(block_ids, device=view.device)] = 0


def checksums_reference(
    blocks: torch.Tensor, runs: Iterable[tuple[int, int]], word: int, seeds: torch.Tensor
) -> torch.Tensor:
    """The checksum of each block, int64 (n,): the scrambled sum of its scrambled words and seed.

    Args:
        blocks: uint8 (n, slot_bytes), as they are in slots.
        runs: offset and length in bytes of each stretch of a slot that holds bytes.
        word: bytes that are summed up together: 1, 2, 4 or 8.
        seeds: int64 (n,).
    """
    total = seeds.clone()
    for offset, nbytes in runs:
        words = _words(blocks[:, offset : offset + nbytes], word)
        places = torch.arange(offset // word, (offset + nbytes) // word)
        total += _scrambled(words ^ places * GOLDEN).sum(1)
    return _scrambled(total)


def _words(part: torch.Tensor, word: int) -> torch.Tensor:
    """Of uint8 (n, nbytes) little-endian words without a sign, int64 (n, nbytes / word)."""
    each = part.reshape(len(part), -1, word).to(torch.int64)
    return sum((each[:, :, i] << 8 * i for i in range(word)), torch.zeros_like(each[:, :, 0]))


def _scrambled(x: torch.Tensor) -> torch.Tensor:
    x = x ^ _shifted(x, 32)
    x = x * FIRST
    x = x ^ _shifted(x, 29)
    x = x * SECOND
    return x ^ _shifted(x, 32)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, as if int64 had no sign."""
    return x >> bits & (1 << 64 - bits) - 1
