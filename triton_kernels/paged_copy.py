"""paged_copy: one launch gathers or scatters the pages of many KV blocks over all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

RUN_COLUMNS = 4
"""A row of the run table: address in block 0, block stride, offset in a slot, bytes."""


@triton.jit(do_not_specialize=["num_blocks", "num_runs", "chunks_per_run", "slot_bytes"])
def _paged_copy(
    runs,  # int64 [num_runs, 4]
    ids,  # int64 [num_blocks, 2]: block id, slot
    host,  # uint8 [num_slots, slot_bytes]
    num_blocks,
    num_runs,
    chunks_per_run,
    slot_bytes,
    STORE: tl.constexpr,
    WORD: tl.constexpr,  # bytes that every address, stride and length is a multiple of
    CHUNK: tl.constexpr,  # words
):
    if WORD == 8:
        dtype = tl.int64
    elif WORD == 4:
        dtype = tl.int32
    elif WORD == 2:
        dtype = tl.int16
    else:
        dtype = tl.int8
    lanes = tl.arange(0, CHUNK).to(tl.int64)
    per_block = num_runs.to(tl.int64) * chunks_per_run
    for item in range(tl.program_id(0).to(tl.int64), num_blocks * per_block, tl.num_programs(0)):
        i_block = item // per_block
        rest = item % per_block
        run = runs + (rest // chunks_per_run) * 4
        block_id = tl.load(ids + i_block * 2)
        slot = tl.load(ids + i_block * 2 + 1)
        gpu = tl.load(run) + block_id * tl.load(run + 1)
        cpu = host + (slot * slot_bytes + tl.load(run + 2))
        words = tl.load(run + 3) // WORD

        offset = (rest % chunks_per_run) * CHUNK + lanes  # [CHUNK]
        mask = offset < words
        p_gpu = gpu.to(tl.pointer_type(dtype), bitcast=True) + offset
        p_cpu = cpu.to(tl.pointer_type(dtype), bitcast=True) + offset
        # Streamed once: first to leave L2, so that the model's own lines stay.
        if STORE:
            value = tl.load(p_gpu, mask=mask, eviction_policy="evict_first")
            tl.store(p_cpu, value, mask=mask, cache_modifier=".cs")
        else:
            value = tl.load(p_cpu, mask=mask, cache_modifier=".cg")
            tl.store(p_gpu, value, mask=mask, eviction_policy="evict_first")


def paged_copy(
    runs: torch.Tensor,
    ids: torch.Tensor,
    host: torch.Tensor,
    num_blocks: int,
    chunks_per_run: int,
    *,
    store: bool,
    word: int,
    chunk_words: int,
    programs: int,
    num_warps: int,
) -> None:
    """Copy blocks between the GPU and host slots on the current stream.

    Args:
        runs: int64 (num_runs, 4) on the GPU: address in block 0, block stride, offset in a slot,
            bytes; all in bytes.
        ids: int64 (at least num_blocks, 2), readable by the GPU: block id and slot.
        host: uint8 (num_slots, slot_bytes), readable and writable by the GPU.
        num_blocks: rows of `ids` to copy; none is allowed.
        chunks_per_run: chunks that cover the longest run.
        store: from the GPU to host slots if true, back if false.
        word: 1, 2, 4 or 8, a divisor of every address, stride, offset and length.
        chunk_words: words that a program moves at a time, a power of two.
        programs: size of the grid.
        num_warps: warps of a program.
    """
    if num_blocks == 0:
        return
    _paged_copy[(programs,)](
        runs,
        ids,
        host,
        num_blocks,
        runs.shape[0],
        chunks_per_run,
        host.shape[1],
        STORE=store,
        WORD=word,
        CHUNK=chunk_words,
        num_warps=num_warps,
    )
