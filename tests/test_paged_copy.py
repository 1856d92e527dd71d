"""The kernel copies exactly the pages' bytes: interpreted on the CPU, compiled on the GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton")

from budget import budget
from geometries import (
    GEOMETRIES,
    Geometry,
    Tensors,
    any_geometry,
    dense,
    memory_of,
    naive_copy,
    noise,
    strided,
)
from hypothesis import given
from hypothesis import strategies as st

from kvortex.layout import Layout, make_layout
from kvortex.paged_kernel import TILE_BYTES, tiling_of
from kvortex.triton_kernels.paged_copy import Tiling, paged_copy
from kvortex.triton_kernels.reference import paged_copy_reference

NUM_SLOTS = 5
POISON = -(1 << 62)
GUARD = 48


@pytest.fixture(scope="module")
def place(device: torch.device) -> torch.device:
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernel was compiled for the GPU")
    return device


@dataclass
class Setup:
    """KV tensors and host slots, both surrounded by noise."""

    tensors: Tensors
    layout: Layout
    whole_host: torch.Tensor
    tiling: Tiling
    programs: int

    @property
    def host(self) -> torch.Tensor:
        return self.whole_host[GUARD:-GUARD].view(NUM_SLOTS, self.layout.slot_bytes)

    def everything(self) -> list[torch.Tensor]:
        """A copy of all bytes that could have been touched."""
        memories = {t.untyped_storage().data_ptr(): memory_of(t) for t in self.tensors.values()}
        return [self.whole_host.clone(), *(memory.cpu().clone() for memory in memories.values())]

    def with_kernel(self, moves: list[tuple[int, int]], *, store: bool) -> None:
        rows = [(*move, POISON) for move in moves]  # seeds, which a copy alone has no use for
        ids = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
        self.with_ids(ids, len(moves), store=store)

    def with_ids(self, ids: torch.Tensor, count: int, *, store: bool, dense: bool = False) -> None:
        device = self.layout.device
        paged_copy(
            self.layout.run_table().to(device),
            ids.pin_memory() if device.type == "cuda" else ids,
            self.host,
            count,
            self.tiling,
            store=store,
            programs=self.programs,
            dense=dense,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()

    def with_reference(self, moves: list[tuple[int, int]], *, store: bool) -> None:
        device = self.layout.device
        pages = [(page.view, page.slot_offset) for page in self.layout.pages]
        ids = torch.tensor([block for block, _ in moves], dtype=torch.int64, device=device)
        slots = torch.tensor([slot for _, slot in moves], dtype=torch.int64, device=device)
        host = self.host.to(device)
        paged_copy_reference(pages, ids, slots, host, store=store)
        self.host.copy_(host)

    def with_loops(self, moves: list[tuple[int, int]], *, store: bool) -> None:
        naive_copy(self.tensors, self.layout.num_blocks, moves, self.host, store=store)


def setup(geometry: Geometry, device: torch.device, tile: tuple[int, int] | None = None) -> Setup:
    """`tile` is (chunk_words, rows); by default as in service."""
    tensors = geometry.make(device)
    layout = make_layout(tensors, geometry.num_blocks)
    host = noise(NUM_SLOTS * layout.slot_bytes + 2 * GUARD, torch.device("cpu"), seed=77)
    runs = layout.run_table()
    tiling = tiling_of(runs, layout.slot_bytes)
    if tile is not None:
        words, rows = tile
        chunks = -(-int(runs[:, 3].max()) // (words * tiling.word))
        tiling = replace(tiling, chunk_words=words, chunks_per_run=chunks, rows=rows, num_warps=1)
    host = host.pin_memory() if device.type == "cuda" else host
    return Setup(tensors, layout, host, tiling, programs=8 if tile is None else 3)


def assert_same(geometry: Geometry, place: torch.device, tile: tuple[int, int] | None) -> None:
    """Kernel, reference and loops leave the same bytes everywhere, both ways."""
    kernel, reference, loops = (setup(geometry, place, tile) for _ in range(3))
    last = kernel.layout.num_blocks - 1
    there = [(last, 3), (0, 1), (last // 2, 4)]
    back = [(0, 0)] if last == 0 else [(0, 3), (last, 0)]
    before = kernel.everything()
    for moves, store in ((there, True), (back, False)):
        kernel.with_kernel(moves, store=store)
        reference.with_reference(moves, store=store)
        loops.with_loops(moves, store=store)
        after = kernel.everything()
        assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for other in (reference, loops):
            for ours, theirs in zip(after, other.everything(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        before = after


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: geometry.name)
def test_launched_as_in_service(geometry: Geometry, place: torch.device) -> None:
    assert_same(geometry, place, None)


@pytest.mark.fuzz
@budget(50)
@given(
    geometry=any_geometry(),
    tile=st.none() | st.tuples(st.sampled_from([4, 16, 64]), st.sampled_from([1, 2, 8])),
    moves=st.lists(st.tuples(st.integers(0, 3), st.integers(0, NUM_SLOTS - 1)), max_size=4),
    store=st.booleans(),
)
def test_any_shapes_and_strides(
    geometry: Geometry,
    tile: tuple[int, int] | None,
    moves: list[tuple[int, int]],
    store: bool,
    place: torch.device,
) -> None:
    kernel, loops = setup(geometry, place, tile), setup(geometry, place, tile)
    blocks = kernel.layout.num_blocks
    into = {(slot if store else block % blocks): (block % blocks, slot) for block, slot in moves}
    kernel.with_kernel([*into.values()], store=store)
    loops.with_loops([*into.values()], store=store)
    for ours, theirs in zip(kernel.everything(), loops.everything(), strict=True):
        assert torch.equal(ours, theirs)


FEW_RUNS = [g for g in GEOMETRIES if g.name in ("HND", "MLA", "kernel blocks", "unequal layers")]


@pytest.mark.parametrize("tile", [(4, 1), (16, 1), (64, 1), (4, 8), (16, 2)])
@pytest.mark.parametrize("geometry", FEW_RUNS, ids=lambda geometry: geometry.name)
def test_runs_of_several_chunks(
    geometry: Geometry, place: torch.device, tile: tuple[int, int]
) -> None:
    assert_same(geometry, place, tile)


@pytest.mark.parametrize("page_bytes", [4096 * 8, 4096 * 8 + 8, 4096 * 8 - 8, 3 * 4096 * 8 + 4])
def test_pages_around_the_largest_chunk(page_bytes: int, place: torch.device) -> None:
    geometry = Geometry("large", lambda device: {"a": dense((3, page_bytes), torch.int8, device)})
    assert_same(geometry, place, None)


WORDS = {
    "a page of 8s": ((3, 24), (24, 1), 8, 8),
    "an odd offset": ((3, 24), (24, 1), 1, 1),
    "an odd stride": ((3, 24), (25, 1), 8, 1),
    "an odd page": ((3, 23), (24, 1), 8, 1),
    "a page of 2s": ((3, 22), (24, 1), 8, 2),
    "an offset of 4": ((3, 24), (24, 1), 4, 4),
    "a stride of 4": ((3, 8), (12, 1), 8, 4),
}


@pytest.mark.parametrize("name", WORDS)
def test_word_divides_every_number(name: str, place: torch.device) -> None:
    shape, strides, offset, word = WORDS[name]
    geometry = Geometry(
        name, lambda device: {"a": strided(shape, strides, torch.int8, device, offset=offset)}
    )
    assert setup(geometry, place).tiling.word == word
    assert_same(geometry, place, None)


def test_slots_that_are_no_multiple_of_a_word(place: torch.device) -> None:
    runs = make_layout({"a": dense((3, 16), torch.float32, place)}).run_table()
    assert tiling_of(runs, 72).word == 8
    assert tiling_of(runs, 68).word == 4
    assert tiling_of(runs, 67).word == 1


@pytest.mark.parametrize("page_bytes", [1, 2, 3, 8, 16, 24, 4096, 32768, 32776, 100_000])
def test_tiles_cover_the_longest_run(page_bytes: int) -> None:
    layout = make_layout({"a": dense((2, page_bytes), torch.int8, torch.device("cpu"))})
    tiling = tiling_of(layout.run_table(), layout.slot_bytes)
    chunk_bytes = tiling.chunk_words * tiling.word
    assert (tiling.chunks_per_run - 1) * chunk_bytes < page_bytes
    assert tiling.chunks_per_run * chunk_bytes >= page_bytes
    assert tiling.chunk_words & (tiling.chunk_words - 1) == 0
    assert tiling.chunk_words * tiling.rows * 8 == TILE_BYTES
    assert 1 <= tiling.num_warps <= 16


def test_dense_copies_ignore_the_slots(place: torch.device) -> None:
    """As between KV tensors and a staging buffer."""
    kernel, loops = setup(HND, place), setup(HND, place)
    ids = torch.tensor([[4, 99, POISON], [0, -1, POISON], [2, 1 << 40, POISON]])
    for store in (True, False):
        kernel.with_ids(ids, 3, store=store, dense=True)
        loops.with_loops([(4, 0), (0, 1), (2, 2)], store=store)
        for ours, theirs in zip(kernel.everything(), loops.everything(), strict=True):
            assert torch.equal(ours, theirs)
        kernel.host.add_(1)
        loops.host.add_(1)


HND = next(g for g in GEOMETRIES if g.name == "HND")


def test_one_block_into_many_slots(place: torch.device) -> None:
    kernel, loops = setup(HND, place), setup(HND, place)
    moves = [(2, 0), (2, 4), (1, 1), (2, 2)]
    kernel.with_kernel(moves, store=True)
    loops.with_loops(moves, store=True)
    assert torch.equal(kernel.whole_host, loops.whole_host)


def test_one_slot_into_many_blocks(place: torch.device) -> None:
    kernel, loops = setup(HND, place), setup(HND, place)
    moves = [(0, 3), (4, 3), (2, 1)]
    kernel.with_kernel(moves, store=False)
    loops.with_loops(moves, store=False)
    for ours, theirs in zip(kernel.everything(), loops.everything(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("store", [True, False])
def test_no_blocks_touch_nothing(place: torch.device, store: bool) -> None:
    kernel = setup(HND, place)
    before = kernel.everything()
    kernel.with_kernel([], store=store)
    assert all(torch.equal(a, b) for a, b in zip(before, kernel.everything(), strict=True))


def test_only_the_first_ids_count(place: torch.device) -> None:
    """The id page is longer than the list; what an earlier copy left in it must not be read."""
    kernel, loops = setup(HND, place), setup(HND, place)
    ids = torch.tensor([[1, 2, POISON], [99, 99, POISON], [-7, 1 << 40, POISON]])
    kernel.with_ids(ids, 1, store=True)
    loops.with_loops([(1, 2)], store=True)
    assert torch.equal(kernel.whole_host, loops.whole_host)
