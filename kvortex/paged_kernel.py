"""PagedKernel: the Triton kernel, compiled for one layout and launched without Triton's detours."""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Any

from kvortex.core import Direction
from kvortex.cuda_driver import LaunchConfiguration, cuda_driver
from kvortex.id_ring import ROW_BYTES, IdRing
from kvortex.layout import common_word, runs_of_a_part
from kvortex.triton_kernels.paged_copy import Sums, Tiling, paged_copy

if TYPE_CHECKING:
    import torch

    from kvortex.cuda_driver import Handle

TILE_BYTES = 32 << 10
"""Bytes a program has in flight: on an H200 over PCIe 5 four programs of it fill the link."""
THREAD_BYTES = 128
"""Of them a thread moves: 16 of each stripe of a chunk. Where a part ends all threads wait for each
other to gather their sums; twice as many threads make that so slow that four programs that store
pages of 8 KiB fill half of the link, instead of 0.73 of it."""
RUN_BYTES = 32
PARAMETERS = struct.Struct("@PPPPPPiiiiiii")
NUMBER_BYTES = 8
SIZES = [8] * 6 + [4] * 7


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
        part_runs=runs_of_a_part(len(runs), slot_bytes),
    )


class PagedKernel:
    """Copies between the pages of a run table and slots, in one direction.

    Args:
        runs: int64 (num_runs, 4) on the GPU.
        slots: uint8 (num_slots, slot_bytes) that the GPU can reach: host slots, or a buffer on it.
        tiling: how to cut the work.
        direction: STORE into the slots, LOAD out of them.
        dense: the i-th block belongs to slot i.
        ids: where `launch` will find its ids, or others like them, and keep its sums.
        copy: if false only sums up what is on the GPU.
    """

    def __init__(
        self,
        runs: torch.Tensor,
        slots: torch.Tensor,
        tiling: Tiling,
        direction: Direction,
        ids: IdRing,
        *,
        dense: bool = False,
        copy: bool = True,
    ) -> None:
        self._runs, self._ids = runs, ids
        self.device = runs.device
        self._num_runs = runs.shape[0]
        self._slot_bytes = slots.shape[1]
        self._tiling = tiling
        self._driver = cuda_driver()
        self._address = runs.data_ptr()
        sums = ids.verdicts.sums if ids.verdicts is not None else None
        ways = ids.verdicts.ways if ids.verdicts is not None else {False}
        self._of_words, self._checksums, self._verdicts = _addresses(sums)
        self._sum_bytes = sums.of_words.shape[1] * NUMBER_BYTES if sums is not None else 0
        self._num_slots = sums.checksums.shape[1] if sums is not None else 0
        self._store = direction is Direction.STORE
        if sums is not None:
            parts = -(-self._num_runs // tiling.part_runs)
            assert parts == len(sums.checksums), "the pool was not made for this layout"
        self._functions: dict[bool, tuple[Handle, LaunchConfiguration, Any, int]] = {}
        for summed in ways:
            compiled = paged_copy(  # no blocks: compiles and loads, copies nothing
                runs,
                ids.rows,
                slots,
                0,
                tiling,
                store=self._store,
                programs=1,
                dense=dense,
                sums=sums if summed else None,
                copy=copy,
            )
            threads = compiled.metadata.num_warps * 32
            launch = LaunchConfiguration((1, 1, 1), (threads, 1, 1), compiled.metadata.shared)
            self._functions[summed] = (
                compiled.function,
                launch,
                launch.programs,
                ctypes.addressof(launch),
            )
        self._buffer, self._pointers = _parameters(self._driver.parameter_sizes(compiled.function))
        self._pointers_at = ctypes.addressof(self._pointers)

    def launch(
        self,
        ids: int,
        row: int,
        slots: int,
        num_blocks: int,
        programs: int,
        stream: Handle,
        *,
        summed: bool = False,
        runs: range | None = None,
    ) -> None:
        """Copy `num_blocks` blocks on a stream.

        Args:
            ids: address of row 0 of the ids.
            row: the first that counts, of the ids and of the sums.
            slots: address of slot 0.
            num_blocks: how many rows of ids.
            programs: size of the grid.
            stream: of CUDA.
            summed: sum up what is moved, one of the `ways` of the ids' verdicts. One row's sums are
                of one copy at a time.
            runs: the rows of the run table to load; None copies all of them. Whole parts, and those
                before them were loaded by the launches before.

        Raises:
            TransferError: it could not be launched.
        """
        first, end = (runs.start, runs.stop) if runs is not None else (0, self._num_runs)
        count, tiling = end - first, self._tiling
        checksums, part_runs = self._checksums, tiling.part_runs
        if not self._store:  # compared up to here, whichever part that is
            checksums += (end - 1) // part_runs * self._num_slots * NUMBER_BYTES
            part_runs = count
        function, configuration, grid, configuration_at = self._functions[summed]
        PARAMETERS.pack_into(
            self._buffer,
            0,
            self._address + first * RUN_BYTES,
            ids + row * ROW_BYTES,
            slots,
            self._of_words + row * self._sum_bytes,
            checksums,
            self._verdicts + row,
            num_blocks,
            count,
            tiling.chunks_per_run,
            self._slot_bytes,
            part_runs,
            self._num_slots,
            end == self._num_runs,
        )
        grid[0] = programs
        configuration.stream = stream
        self._driver.launch(configuration_at, function, self._pointers_at)


def _addresses(sums: Sums | None) -> tuple[int, int, int]:
    if sums is None:
        return 0, 0, 0
    return sums.of_words.data_ptr(), sums.checksums.data_ptr(), sums.verdicts.data_ptr()


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
