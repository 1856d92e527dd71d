"""paged_copy: one launch gathers or scatters the pages of many KV blocks over all layers.

The same kernel sums up what it moves, a 64-bit checksum for each block, and compares it on the way
back: a block that is wrong then is cleared, so that nobody computes from it. It can also do that
alone, for bytes that a copy engine of the GPU moves.

Runs are summed up in parts of equal number, and the checksum of a block is kept up to the end of
each: the last one is that of the whole. So a load can be compared as its parts arrive.
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
CLEARED_AT_A_TIME = tl.constexpr(4096)


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
    return i_block, i_run, live, block_id, slot, base, stride, start, words


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
def _add(sums, place, total, live):
    """Gather the sums of all threads and add those of each chunk to its part's."""
    of_rows = tl.reduce(total.to(tl.int64, bitcast=True), 1, PLUS)
    tl.atomic_add(sums + place, of_rows, mask=live, sem="relaxed")


@triton.jit
def _part_of(chunk, block_chunks, part_chunks, parts):
    """The number of a chunk's part among those of all blocks."""
    return chunk // block_chunks * parts + chunk % block_chunks // part_chunks


@triton.jit
def _checksum(total):
    return _scrambled(total.to(tl.uint64, bitcast=True)).to(tl.int64, bitcast=True)


@triton.jit
def _keep(ids, sums, checksums, num_blocks, num_slots, parts):
    """Turn the sums of the parts of each block into its checksums."""
    for start in range(0, num_blocks, FINISHED_AT_A_TIME):
        i = start + tl.arange(0, FINISHED_AT_A_TIME)
        live = i < num_blocks
        slot = tl.load(ids + i * 3 + 1, mask=live, other=0)
        total = tl.load(ids + i * 3 + 2, mask=live, other=0)
        zeros = tl.full(total.shape, 0, tl.int64)
        for part in range(parts):
            of_part = sums + i * (parts + 1) + 1 + part
            total += tl.atomic_xchg(of_part, zeros, mask=live, sem="relaxed")
            tl.store(checksums + part * num_slots.to(tl.int64) + slot, _checksum(total), mask=live)


@triton.jit
def _compare(ids, runs, sums, checksums, verdicts, num_blocks, num_runs, last):
    """Find out which blocks are not what was stored, as far as they have come, and clear them."""
    for start in range(0, num_blocks, FINISHED_AT_A_TIME):
        i = start + tl.arange(0, FINISHED_AT_A_TIME)
        live = i < num_blocks
        slot = tl.load(ids + i * 3 + 1, mask=live, other=0)
        total = tl.load(ids + i * 3 + 2, mask=live, other=0)
        so_far = sums + i * 2 + 1
        total += tl.load(so_far, mask=live, other=0, cache_modifier=".cg")
        if last > 0:
            tl.store(so_far, tl.full(total.shape, 0, tl.int64), mask=live)
        kept = tl.load(checksums + slot, mask=live, other=0, cache_modifier=".cg")
        wrong = live & (kept != _checksum(total))
        tl.store(verdicts + i, tl.full(i.shape, 1, tl.int8), mask=wrong)
        if tl.reduce(wrong.to(tl.int32), 0, PLUS) > 0:
            for each in range(start, tl.minimum(start + FINISHED_AT_A_TIME, num_blocks)):
                if tl.reduce((wrong & (i == each)).to(tl.int32), 0, PLUS) > 0:
                    _clear(tl.load(ids + each * 3), runs, num_runs)


@triton.jit
def _clear(block_id, runs, num_runs):
    """Zeros are no number that a model could choke on, whatever it makes of them."""
    for run in range(num_runs):
        base = tl.load(runs + run * 4) + block_id * tl.load(runs + run * 4 + 1)
        nbytes = tl.load(runs + run * 4 + 3)
        for start in range(0, nbytes, CLEARED_AT_A_TIME):
            i = start + tl.arange(0, CLEARED_AT_A_TIME)
            p = base.to(tl.pointer_type(tl.int8), bitcast=True) + i
            tl.store(p, tl.full(i.shape, 0, tl.int8), mask=i < nbytes)


@triton.jit(
    do_not_specialize=[
        "num_blocks",
        "num_runs",
        "chunks_per_run",
        "slot_bytes",
        "part_runs",
        "num_slots",
        "last",
    ],
    do_not_specialize_on_alignment=["ids", "verdicts"],  # of any row
)
def _paged_copy(
    runs,  # int64 [num_runs, 4]
    ids,  # int64 [num_blocks, 3]: block id, slot, and what the block's checksum starts from
    slots,  # uint8 [num_slots, slot_bytes]
    sums,  # int64 [num_blocks, 1 + parts]: programs that ended, in the first row; of each part
    checksums,  # int64 [parts, num_slots] to keep, or [num_slots] to compare
    verdicts,  # int8 [num_blocks]
    num_blocks,
    num_runs,
    chunks_per_run,
    slot_bytes,
    part_runs,  # of these runs that are summed up together; all of them where they are compared
    num_slots,
    last,  # whether sums begin anew: no later launch brings more runs of these blocks
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
    num_items = num_blocks * num_runs * chunks_per_run
    parts = (num_runs + part_runs - 1) // part_runs
    # Rounds of a program follow each other, so that it meets few blocks and sums up each seldom.
    all_rounds = (num_items + ROWS - 1) // ROWS
    rounds = (all_rounds + tl.num_programs(0) - 1) // tl.num_programs(0)
    first_round = tl.program_id(0) * rounds
    end = tl.minimum((first_round + rounds) * ROWS, num_items)
    item = first_round * ROWS + tl.arange(0, ROWS)  # [ROWS], as everything of a chunk
    i_block, i_run, live, block_id, slot, base, stride, start, words = _of_chunks(
        item, end, ids, runs, num_runs, chunks_per_run, WORD
    )
    if SUM:
        block_chunks = chunks_per_run * num_runs
        part_chunks = chunks_per_run * part_runs
        lane_keys = lanes.to(tl.uint64) * GOLDEN
        total = tl.full([ROWS, STRIPE], 0, tl.uint64)
        held = tl.full([STRIPES, ROWS, STRIPE], 0, dtype)
        held_keys = tl.full([ROWS], 0, tl.uint64)
        held_words = tl.full([ROWS], 0, tl.int64)
        held_place = tl.full([ROWS], 0, tl.int32)
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

        # While these bytes are under way, what the next round needs is fetched: ids may come over
        # the link. Then those of the round before are summed up. Many threads' sums are gathered
        # only where a part ends: they have to wait for each other then.
        next_item = item + ROWS
        following = _of_chunks(next_item, end, ids, runs, num_runs, chunks_per_run, WORD)
        if SUM:
            total += _summed(held, held_keys, held_words, lanes, lane_keys)
            one = _part_of(chunk - ROWS, block_chunks, part_chunks, parts)
            if one != _part_of(chunk + ROWS - 1, block_chunks, part_chunks, parts):
                _add(sums, held_place, total, held_live)
                total = tl.full([ROWS, STRIPE], 0, tl.uint64)
            held, held_words, held_live = value, words - first, live
            held_place = i_block * (parts + 1) + 1 + i_run // part_runs
            held_keys = (start // WORD + first).to(tl.uint64, bitcast=True) * GOLDEN

        # Bytes are streamed once: first to leave L2, so that the model's stay.
        if COPY:
            if STORE:
                tl.store(p_cpu, value, mask=mask, cache_modifier=".cs")
            else:
                tl.store(p_gpu, value, mask=mask, eviction_policy="evict_first")
        item = next_item
        i_block, i_run, live, block_id, slot, base, stride, start, words = following
    if SUM:
        total += _summed(held, held_keys, held_words, lanes, lane_keys)
        _add(sums, held_place, total, held_live)
        tl.debug_barrier()
        ended = tl.atomic_add(sums, 1, sem="acq_rel")
        if ended == tl.num_programs(0) - 1:
            tl.store(sums, 0)
            if STORE:
                _keep(ids, sums, checksums, num_blocks, num_slots, parts)
            else:
                _compare(ids, runs, sums, checksums, verdicts, num_blocks, num_runs, last)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a program of the kernel cuts its work: `rows` chunks of `chunk_words` words at a time.

    `word` is 1, 2, 4 or 8 bytes, a divisor of every address, stride, offset and length;
    `chunk_words` and `rows` are powers of two; `chunks_per_run` chunks cover the longest run.
    `part_runs` of the run table, in its order, are a part, which has a checksum at its end.
    """

    word: int
    chunk_words: int
    chunks_per_run: int
    rows: int
    num_warps: int
    part_runs: int


@dataclass(frozen=True, slots=True)
class Sums:
    """Where a launch keeps checksums.

    `of_words` is int64 (at least num_blocks, 1 + n) on the GPU, for n = 1 part that is loaded at a
    time or all that are stored; it is zero before and after every launch, or before the first and
    after the last that bring parts of the same blocks. `checksums` int64 (parts, num_slots), each
    of a block's bytes up to the end of a part, and `verdicts` int8 (at least num_blocks,) are
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
    part: int | None = None,
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
        sums: sum the blocks up as well, and clear on the GPU what is wrong; None only copies.
        copy: if false only sums up what is on the GPU.
        part: of a load, the last one that `runs` bring; those before it were brought by launches
            before. None brings all of them.

    Returns:
        Triton's compiled kernel.
    """
    checksums = sums.checksums if sums is not None else ids
    last = sums is None or part is None or part == len(checksums) - 1
    if sums is not None and not store:
        checksums = checksums[-1 if part is None else part]
    return _paged_copy[(programs,)](
        runs,
        ids,
        slots,
        sums.of_words if sums is not None else ids,
        checksums,
        sums.verdicts if sums is not None else slots,
        num_blocks,
        runs.shape[0],
        tiling.chunks_per_run,
        slots.shape[1],
        tiling.part_runs if store else runs.shape[0],
        checksums.shape[-1],
        int(last),
        STORE=store,
        COPY=copy,
        SUM=sums is not None,
        DENSE=dense,
        WORD=tiling.word,
        CHUNK=tiling.chunk_words,
        ROWS=tiling.rows,
        num_warps=tiling.num_warps,
    )
