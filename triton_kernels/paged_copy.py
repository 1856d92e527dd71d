"""paged_copy: one launch gathers or scatters the pages of many KV blocks over all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch


@triton.jit(do_not_specialize=["num_items", "num_runs", "chunks_per_run", "slot_bytes"])
def _paged_copy(
    runs,  # int64 [num_runs, 4]
    ids,  # int64 [num_blocks, 2]: block id, slot
    slots,  # uint8 [num_slots, slot_bytes]
    num_items,  # num_blocks * num_runs * chunks_per_run
    num_runs,
    chunks_per_run,
    slot_bytes,
    STORE: tl.constexpr,
    DENSE: tl.constexpr,  # block number i of the list belongs to slot i
    WORD: tl.constexpr,  # bytes that every address, stride and length is a multiple of
    CHUNK: tl.constexpr,  # words
    ROWS: tl.constexpr,  # chunks that a program moves at a time
):
    if WORD == 8:
        dtype = tl.int64
    elif WORD == 4:
        dtype = tl.int32
    elif WORD == 2:
        dtype = tl.int16
    else:
        dtype = tl.int8
    lanes = tl.arange(0, CHUNK)
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS], as everything of a chunk
    i_run = item // chunks_per_run % num_runs
    i_block = item // chunks_per_run // num_runs
    live = item < num_items
    block_id = tl.load(ids + i_block * 2, mask=live, other=0)
    slot = tl.load(ids + i_block * 2 + 1, mask=live, other=0)
    base = tl.load(runs + i_run * 4)
    stride = tl.load(runs + i_run * 4 + 1)
    start = tl.load(runs + i_run * 4 + 2)
    words = tl.where(live, tl.load(runs + i_run * 4 + 3) // WORD, 0)
    for _ in range(tl.program_id(0), (num_items + ROWS - 1) // ROWS, tl.num_programs(0)):
        place = i_block.to(tl.int64) if DENSE else slot
        gpu = (base + block_id * stride).to(tl.pointer_type(dtype), bitcast=True)
        cpu = (slots + (place * slot_bytes + start)).to(tl.pointer_type(dtype), bitcast=True)
        offset = (item % chunks_per_run)[:, None].to(tl.int64) * CHUNK + lanes[None, :]
        mask = offset < words[:, None]  # [ROWS, CHUNK]
        p_gpu = gpu[:, None] + offset
        p_cpu = cpu[:, None] + offset

        # What the next round needs is fetched while this round's bytes are under way: ids may
        # come over the link. Bytes are streamed once: first to leave L2, so that the model's stay.
        item += tl.num_programs(0) * ROWS
        i_run = item // chunks_per_run % num_runs
        i_block = item // chunks_per_run // num_runs
        live = item < num_items
        if STORE:
            value = tl.load(p_gpu, mask=mask, eviction_policy="evict_first")
        else:
            value = tl.load(p_cpu, mask=mask, cache_modifier=".cg")
        block_id = tl.load(ids + i_block * 2, mask=live, other=0)
        slot = tl.load(ids + i_block * 2 + 1, mask=live, other=0)
        base = tl.load(runs + i_run * 4)
        stride = tl.load(runs + i_run * 4 + 1)
        start = tl.load(runs + i_run * 4 + 2)
        words = tl.where(live, tl.load(runs + i_run * 4 + 3) // WORD, 0)
        if STORE:
            tl.store(p_cpu, value, mask=mask, cache_modifier=".cs")
        else:
            tl.store(p_gpu, value, mask=mask, eviction_policy="evict_first")


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a program of the kernel cuts its work: `rows` chunks of `chunk_words` words at a time.

    `word` is 1, 2, 4 or 8 bytes, a divisor of every address, stride, offset and length;
    `chunk_words` and `rows` are powers of two; `chunks_per_run` chunks cover the longest run.
    """

    word: int
    chunk_words: int
    chunks_per_run: int
    rows: int
    num_warps: int


def paged_copy(
    runs: torch.Tensor,
    ids: torch.Tensor,
    slots: torch.Tensor,
    num_blocks: int,
    tiling: Tiling,
    *,
    store: bool,
    programs: int,
    dense: bool = False,
) -> Any:  # noqa: ANN401  (Triton's type has moved between its versions)
    """Copy blocks between the GPU and slots on the current stream.

    Args:
        runs: int64 (num_runs, 4) on the GPU: address in block 0, block stride, offset in a slot,
            bytes; all in bytes.
        ids: int64 (at least num_blocks, 2), readable by the GPU: block id and slot.
        slots: uint8 (num_slots, slot_bytes), readable and writable by the GPU.
        num_blocks: rows of `ids` to copy; none is allowed.
        tiling: how to cut the work.
        store: from the GPU to slots if true, back if false.
        programs: size of the grid.
        dense: the i-th block belongs to slot i; the second column of `ids` is not read.

    Returns:
        Triton's compiled kernel.
    """
    return _paged_copy[(programs,)](
        runs,
        ids,
        slots,
        num_blocks * runs.shape[0] * tiling.chunks_per_run,
        runs.shape[0],
        tiling.chunks_per_run,
        slots.shape[1],
        STORE=store,
        DENSE=dense,
        WORD=tiling.word,
        CHUNK=tiling.chunk_words,
        ROWS=tiling.rows,
        num_warps=tiling.num_warps,
    )
