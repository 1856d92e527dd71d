"""PagedKernel: the Triton kernel, compiled for one layout and launched without Triton's detours."""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Any

from kvortex.core import Direction
from kvortex.cuda_driver import LaunchConfiguration, cuda_driver
from kvortex.layout import common_word
from kvortex.triton_kernels.paged_copy import Tiling, paged_copy

if TYPE_CHECKING:
    import torch

    from kvortex.cuda_driver import Handle

TILE_BYTES = 32 << 10
"""Bytes a program has in flight: on an H200 over PCIe 5 four programs of it fill the link."""
THREAD_BYTES = 64
"""Of them a thread moves, in 8-byte words."""
RUN_BYTES = 32
PARAMETERS = struct.Struct("@PPPPPPiiiii")
NO_SUMS = (0, 0, 0)
SIZES = [8] * 6 + [4] * 5


def tiling_of(runs: torch.Tensor, slot_bytes: int) -> Tiling:
    """Cut a layout, given by its run table (see `Layout.run_table`), into tiles of equal size."""
    word = common_word(runs, slot_bytes)
    longest = max(1, int(runs[:, 3].max()) // word)
    tile_words = TILE_BYTES // 8
    chunk_words = min(tile_words, 1 << (longest - 1).bit_length())
    rows = tile_words // chunk_words
    threads = rows * chunk_words * word // THREAD_BYTES
    return Tiling(
        word=word,
        chunk_words=chunk_words,
        chunks_per_run=-(-longest // chunk_words),
        rows=rows,
        num_warps=min(16, max(1, threads // 32)),
    )


class PagedKernel:
    """Copies between the pages of a run table and slots, in one direction.

    Args:
        runs: int64 (num_runs, 4) on the GPU.
        slots: uint8 (num_slots, slot_bytes) that the GPU can reach: host slots, or a buffer on it.
        tiling: how to cut the work.
        direction: STORE into the slots, LOAD out of them.
        dense: the i-th block belongs to slot i.
        ids: int64 (n, 2) pinned, of the kind that `launch` will be given.
    """

    def __init__(
        self,
        runs: torch.Tensor,
        slots: torch.Tensor,
        tiling: Tiling,
        direction: Direction,
        ids: torch.Tensor,
        *,
        dense: bool = False,
    ) -> None:
        self._runs = runs
        self._num_runs = runs.shape[0]
        self._slot_bytes = slots.shape[1]
        self._tiling = tiling
        store = direction is Direction.STORE
        compiled = paged_copy(
            runs, ids, slots, 0, tiling, store=store, programs=1, dense=dense
        )  # no blocks: compiles and loads, copies nothing
        self._function: Handle = compiled.function
        self._driver = cuda_driver()
        self._address = runs.data_ptr()
        threads = compiled.metadata.num_warps * 32
        self._configuration = LaunchConfiguration(
            (1, 1, 1), (threads, 1, 1), compiled.metadata.shared
        )
        self._grid = self._configuration.programs
        self._buffer, self._pointers = _parameters(self._driver.parameter_sizes(self._function))
        self._configuration_at = ctypes.addressof(self._configuration)
        self._pointers_at = ctypes.addressof(self._pointers)

    def launch(
        self,
        ids: int,
        slots: int,
        num_blocks: int,
        programs: int,
        stream: Handle,
        runs: range | None = None,
    ) -> None:
        """Copy `num_blocks` blocks on a stream.

        Args:
            ids: address of the first row of ids.
            slots: address of slot 0.
            num_blocks: how many rows of ids.
            programs: size of the grid.
            stream: of CUDA.
            runs: the rows of the run table to copy; None copies all of them.

        Raises:
            TransferError: it could not be launched.
        """
        first, count = (runs.start, len(runs)) if runs is not None else (0, self._num_runs)
        chunks = self._tiling.chunks_per_run
        PARAMETERS.pack_into(
            self._buffer,
            0,
            self._address + first * RUN_BYTES,
            ids,
            slots,
            *NO_SUMS,
            num_blocks * count * chunks,
            count,
            chunks,
            self._slot_bytes,
            0,
        )
        self._grid[0] = programs
        self._configuration.stream = stream
        self._driver.launch(self._configuration_at, self._function, self._pointers_at)


def _parameters(sizes: list[int]) -> tuple[ctypes.Array[ctypes.c_char], ctypes.Array[Any]]:
    """Room for a kernel's parameters, and a pointer to each; those that Triton adds stay null."""
    assert sizes[: len(SIZES)] == SIZES, f"unexpected kernel parameters: {sizes}"
    offsets, end = [], 0
    for size in sizes:
        start = -(-end // size) * size
        offsets.append(start)
        end = start + size
    buffer = ctypes.create_string_buffer(end)
    base = ctypes.addressof(buffer)
    return buffer, (ctypes.c_void_p * len(sizes))(*(base + offset for offset in offsets))
