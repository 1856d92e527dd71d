"""The copy of paged KV blocks in plain torch: what the kernel must equal, and the CPU's path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable


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
