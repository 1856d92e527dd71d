"""paged_copy: one launch gathers or scatters the pages of many KV blocks over all layers.

The same kernel sums up what it moves, a 64-bit checksum for each block, and compares it on the way
back; it can also do that alone, for bytes that a copy engine of the GPU moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
FIRST = tl.constexpr(0xFF51AFD7ED558CCD)
SECOND = tl.constexpr(0xC4CEB9FE1A85EC53)
"""Odd numbers of the finalisers of SplitMix64 and MurmurHash3 (public domain)."""
PLUS = tl.standard._sum_combine
"""What `tl.sum` adds with. In the interpreter `tl.sum` itself can be called only if all of Triton
is interpreted, and any other function is called for each pair of numbers."""
FINISHED_AT_A_TIME = tl.constexpr(1024)


@triton.jit
def _scrambled(x):
    """A bijection of 64-bit words in which every bit of the one decides every bit of the other."""
    x = x ^ (x >> 32)
    x = x * FIRST
    x = x ^ (x >> 29)
    x = x * SECOND
    return x ^ (x >> 32)


@triton.jit
def _of_chunks(item, end, ids, runs, num_runs, chunks_per_run, WORD: tl.constexpr):
    """What must be known of chunks: all [ROWS], and of those from `end` on, that there are none."""
    i_run = item // chunks_per_run % num_runs
    i_block = item // chunks_per_run // num_runs
    live = item < end
    block_id = tl.load(ids + i_block * 3, mask=live, other=0)
    slot = tl.load(ids + i_block * 3 + 1, mask=live, other=0)
    base = tl.load(runs + i_run * 4)
    stride = tl.load(runs + i_run * 4 + 1)
    start = tl.load(runs + i_run * 4 + 2)
    words = tl.where(live, tl.load(runs + i_run * 4 + 3) // WORD, 0)
    return i_block, live, block_id, slot, base, stride, start, words


@triton.jit
def _summed(value, row_keys, words, lanes, lane_keys):
    """Sums [ROWS, STRIPE] of the words [STRIPES, ROWS, STRIPE] of some chunks, each scrambled with
    its place in a slot; `words` [ROWS] are how many of a chunk there are."""
    if value.dtype == tl.int64:
        word = value.to(tl.uint64, bitcast=True)
    elif value.dtype == tl.int32:
        word = value.to(tl.uint32, bitcast=True).to(tl.uint64)
    elif value.dtype == tl.int16:
        word = value.to(tl.uint16, bitcast=True).to(tl.uint64)
    else:
        word = value.to(tl.uint8, bitcast=True).to(tl.uint64)
    scrambled = _scrambled(word ^ (row_keys[None, :, None] + lane_keys))
    scrambled = tl.where(lanes < words[None, :, None], scrambled, 0)
    return tl.reduce(scrambled, 0, PLUS)


@triton.jit
def _add(sums, i_block, total, live):
    """Gather the sums of all threads and add those of each chunk to its block's."""
    of_rows = tl.reduce(total.to(tl.int64, bitcast=True), 1, PLUS)
    tl.atomic_add(sums + i_block * 2, of_rows, mask=live, sem="relaxed")


@triton.jit
def _finish(ids, sums, checksums, verdicts, num_blocks, STORE: tl.constexpr):
    """Turn the sums of all words of a block into its checksum, which is kept or compared."""
    for start in range(0, num_blocks, FINISHED_AT_A_TIME):
        i = start + tl.arange(0, FINISHED_AT_A_TIME)
        live = i < num_blocks
        slot = tl.load(ids + i * 3 + 1, mask=live, other=0)
        seed = tl.load(ids + i * 3 + 2, mask=live, other=0)
        total = tl.atomic_xchg(
            sums + i * 2, tl.full(slot.shape, 0, tl.int64), mask=live, sem="relaxed"
        )
        number = (total + seed).to(tl.uint64, bitcast=True)
        checksum = _scrambled(number).to(tl.int64, bitcast=True)
        if STORE:
            tl.store(checksums + slot, checksum, mask=live)
        else:
            kept = tl.load(checksums + slot, mask=live, other=0, cache_modifier=".cg")
            wrong = live & (kept != checksum)
            tl.store(verdicts + i, tl.full(i.shape, 1, tl.int8), mask=wrong)


@triton.jit(
    do_not_specialize=["num_items", "num_runs", "chunks_per_run", "slot_bytes", "finish"],
    do_not_specialize_on_alignment=["ids", "verdicts"],  # of any row
)
def _paged_copy(
    runs,  # int64 [num_runs, 4]
    ids,  # int64 [num_blocks, 3]: block id, slot, and what the block's checksum starts from
    slots,  # uint8 [num_slots, slot_bytes]
    sums,  # int64 [num_blocks, 2]: of words so far, and in the first row programs that ended
    checksums,  # int64 [num_slots]
    verdicts,  # int8 [num_blocks]
    num_items,  # num_blocks * num_runs * chunks_per_run
    num_runs,
    chunks_per_run,
    slot_bytes,
    finish,  # blocks whose last runs these are: all of this launch, or none
    STORE: tl.constexpr,
    COPY: tl.constexpr,  # if not, the pages on the GPU are only summed up
    SUM: tl.constexpr,
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
    # A chunk is cut into stripes, one below the other in a thread's registers: so a thread has to
    # do with one chunk only, and sums up its words without asking the others.
    STRIPES: tl.constexpr = 8 if CHUNK > 8 else CHUNK
    STRIPE: tl.constexpr = CHUNK // STRIPES
    stripes = tl.arange(0, STRIPES)[:, None, None] * STRIPE
    lanes = stripes + tl.arange(0, STRIPE)[None, None, :]
    # Rounds of a program follow each other, so that it meets few blocks and sums up each seldom.
    all_rounds = (num_items + ROWS - 1) // ROWS
    rounds = (all_rounds + tl.num_programs(0) - 1) // tl.num_programs(0)
    first_round = tl.program_id(0) * rounds
    end = tl.minimum((first_round + rounds) * ROWS, num_items)
    item = first_round * ROWS + tl.arange(0, ROWS)  # [ROWS], as everything of a chunk
    i_block, live, block_id, slot, base, stride, start, words = _of_chunks(
        item, end, ids, runs, num_runs, chunks_per_run, WORD
    )
    if SUM:
        block_chunks = chunks_per_run * num_runs
        lane_keys = lanes.to(tl.uint64) * GOLDEN
        total = tl.full([ROWS, STRIPE], 0, tl.uint64)
        held = tl.full([STRIPES, ROWS, STRIPE], 0, dtype)
        held_keys = tl.full([ROWS], 0, tl.uint64)
        held_words = tl.full([ROWS], 0, tl.int64)
        held_block = tl.full([ROWS], 0, tl.int32)
        held_live = held_words > 0
    for chunk in range(first_round * ROWS, end, ROWS):
        place = i_block.to(tl.int64) if DENSE else slot
        gpu = (base + block_id * stride).to(tl.pointer_type(dtype), bitcast=True)
        cpu = (slots + (place * slot_bytes + start)).to(tl.pointer_type(dtype), bitcast=True)
        first = (item % chunks_per_run).to(tl.int64) * CHUNK
        offset = first[None, :, None] + lanes
        mask = offset < words[None, :, None]  # [STRIPES, ROWS, STRIPE]
        p_gpu = gpu[None, :, None] + offset
        p_cpu = cpu[None, :, None] + offset
        if STORE or not COPY:
            value = tl.load(p_gpu, mask=mask, eviction_policy="evict_first")
        else:
            value = tl.load(p_cpu, mask=mask, cache_modifier=".cg")

        # While these bytes are under way those of the round before are summed up. Many threads'
        # sums are gathered only where a block ends: they have to wait for each other then.
        if SUM:
            total += _summed(held, held_keys, held_words, lanes, lane_keys)
            if (chunk - ROWS) // block_chunks != (chunk + ROWS - 1) // block_chunks:
                _add(sums, held_block, total, held_live)
                total = tl.full([ROWS, STRIPE], 0, tl.uint64)
            held, held_words, held_block, held_live = value, words - first, i_block, live
            held_keys = (start // WORD + first).to(tl.uint64, bitcast=True) * GOLDEN

        # So is what the next round needs fetched: ids may come over the link. Bytes are streamed
        # once: first to leave L2, so that the model's stay.
        item += ROWS
        i_block, live, block_id, slot, base, stride, start, words = _of_chunks(
            item, end, ids, runs, num_runs, chunks_per_run, WORD
        )
        if COPY:
            if STORE:
                tl.store(p_cpu, value, mask=mask, cache_modifier=".cs")
            else:
                tl.store(p_gpu, value, mask=mask, eviction_policy="evict_first")
    if SUM:
        total += _summed(held, held_keys, held_words, lanes, lane_keys)
        _add(sums, held_block, total, held_live)
        if finish > 0:
            tl.debug_barrier()
            ended = tl.atomic_add(sums + 1, 1, sem="acq_rel")
            if ended == tl.num_programs(0) - 1:
                tl.store(sums + 1, 0)
                _finish(ids, sums, checksums, verdicts, finish, STORE)


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


@dataclass(frozen=True, slots=True)
class Sums:
    """Where a launch keeps checksums.

    `of_words` is int64 (at least num_blocks, 2) on the GPU, all zero before and after every launch
    that finishes; `checksums` int64 (num_slots,) and `verdicts` int8 (at least num_blocks,) are
    readable and writable by the GPU. A verdict is set to 1 where a block that was loaded does not
    have its slot's checksum, and otherwise left as it is.
    """

    of_words: torch.Tensor
    checksums: torch.Tensor
    verdicts: torch.Tensor


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
    sums: Sums | None = None,
    copy: bool = True,
    finish: bool = True,
) -> Any:  # noqa: ANN401  (Triton's type has moved between its versions)
    """Copy blocks between the GPU and slots on the current stream.

    Args:
        runs: int64 (num_runs, 4) on the GPU: address in block 0, block stride, offset in a slot,
            bytes; all in bytes.
        ids: int64 (at least num_blocks, 3), readable by the GPU: block id, slot, and the seed of
            the block's checksum, which only `sums` asks for.
        slots: uint8 (num_slots, slot_bytes), readable and writable by the GPU.
        num_blocks: rows of `ids` to copy; none is allowed.
        tiling: how to cut the work.
        store: from the GPU to slots if true, back if false.
        programs: size of the grid.
        dense: the i-th block belongs to slot i of `slots`; its checksum to the slot in `ids`.
        sums: sum the blocks up as well; None only copies them.
        copy: if false only sums up what is on the GPU.
        finish: no later launch brings further runs of these blocks.

    Returns:
        Triton's compiled kernel.
    """
    return _paged_copy[(programs,)](
        runs,
        ids,
        slots,
        sums.of_words if sums is not None else ids,
        sums.checksums if sums is not None else ids,
        sums.verdicts if sums is not None else slots,
        num_blocks * runs.shape[0] * tiling.chunks_per_run,
        runs.shape[0],
        tiling.chunks_per_run,
        slots.shape[1],
        num_blocks if finish else 0,
        STORE=store,
        COPY=copy,
        SUM=sums is not None,
        DENSE=dense,
        WORD=tiling.word,
        CHUNK=tiling.chunk_words,
        ROWS=tiling.rows,
        num_warps=tiling.num_warps,
    )
