"""The kernel's checksums: equal to plain Python's, however it is launched; one wrong byte shows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from geometries import GEOMETRIES, Geometry, dense, noise, strided

from kvortex.layout import Layout, make_layout
from kvortex.paged_kernel import tiling_of
from kvortex.triton_kernels.paged_copy import Sums, Tiling, paged_copy
from kvortex.triton_kernels.reference import checksums_reference, paged_copy_reference

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_SLOTS = 5
SEEDS = [7, -5, 1 << 62]


@pytest.fixture(scope="module")
def place(device: torch.device) -> torch.device:
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernel was compiled for the GPU")
    return device


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


class Setup:
    """KV tensors, slots, and where the kernel keeps checksums; three blocks go to three slots."""

    def __init__(
        self,
        geometry: Geometry,
        device: torch.device,
        tiling: Tiling | None = None,
        part_runs: int | None = None,
    ) -> None:
        self.layout: Layout = make_layout(geometry.make(device), geometry.num_blocks)
        self.runs = self.layout.run_table()
        tiling = tiling or tiling_of(self.runs, self.layout.slot_bytes)
        self.tiling = replace(tiling, part_runs=part_runs or tiling.part_runs)
        self.num_parts = -(-len(self.runs) // self.tiling.part_runs)
        size = NUM_SLOTS * self.layout.slot_bytes
        self.slots = pinned(
            noise(size, torch.device("cpu"), seed=77).view(NUM_SLOTS, self.layout.slot_bytes),
            device,
        )
        last = self.layout.num_blocks - 1
        rows = zip((last, 0, last // 2), (3, 1, 4), SEEDS, strict=True)
        self.ids = pinned(torch.tensor([list(row) for row in rows]), device)
        self.sums = Sums(
            torch.zeros(3, 1 + self.num_parts, dtype=torch.int64, device=device),
            pinned(torch.zeros(self.num_parts, NUM_SLOTS, dtype=torch.int64), device),
            pinned(torch.zeros(3, dtype=torch.int8), device),
        )
        self.of_loads = torch.zeros(3, 2, dtype=torch.int64, device=device)

    def launch(
        self,
        *,
        store: bool,
        programs: int = 3,
        runs: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        dense: bool = False,
        copy: bool = True,
        part: int | None = None,
    ) -> None:
        device = self.layout.device
        sums = self.sums if store else replace(self.sums, of_words=self.of_loads)
        paged_copy(
            (self.runs if runs is None else runs).to(device),
            self.ids,
            self.slots if slots is None else slots,
            len(self.ids),
            self.tiling,
            store=store,
            programs=programs,
            sums=sums,
            dense=dense,
            copy=copy,
            part=part,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert part not in {None, self.num_parts - 1} or not sums.of_words.any()

    def load_parts(self, parts: list[int]) -> None:
        """One launch for each, up to the end of a part."""
        start = 0
        for part in parts:
            end = (part + 1) * self.tiling.part_runs
            self.launch(store=False, runs=self.runs[start:end], part=part)
            start = end

    def stored(self) -> list[int]:
        """The checksums that the kernel left of the three."""
        return self.sums.checksums[-1, self.ids[:, 1]].tolist()

    def wrong(self) -> list[int]:
        """The verdicts of a load."""
        self.sums.verdicts.zero_()
        self.launch(store=False)
        return self.sums.verdicts.tolist()

    def block(self, number: int) -> torch.Tensor:
        """The bytes that one of the three has on the GPU, packed like a slot."""
        packed = torch.zeros(1, self.layout.slot_bytes, dtype=torch.uint8)
        pages = [(page.view, page.slot_offset) for page in self.layout.pages]
        zero = torch.zeros(1, dtype=torch.int64)
        paged_copy_reference(pages, self.ids[number, :1], zero, packed, store=True)
        return packed[0]

    def expected(self, of: torch.Tensor | None = None) -> list[int]:
        """By plain Python, of what is in the slots; by default of all runs."""
        runs = [(run[2], run[3]) for run in (self.runs if of is None else of).tolist()]
        slots = [bytes(self.slots[slot].tolist()) for slot in self.ids[:, 1].tolist()]
        word = self.tiling.word
        return [naive(slot, runs, word, seed) for slot, seed in zip(slots, SEEDS, strict=True)]


def scrambled(x: int) -> int:
    x ^= x >> 32
    x = x * 0xFF51AFD7ED558CCD % (1 << 64)
    x ^= x >> 29
    x = x * 0xC4CEB9FE1A85EC53 % (1 << 64)
    return x ^ x >> 32


def naive(slot: bytes, runs: list[tuple[int, int]], word: int, seed: int) -> int:
    """The definition, a word at a time."""
    total = seed
    for offset, nbytes in runs:
        for start in range(offset, offset + nbytes, word):
            number = int.from_bytes(slot[start : start + word], "little")
            total += scrambled(number ^ start // word * 0x9E3779B97F4A7C15 % (1 << 64))
    number = scrambled(total % (1 << 64))
    return number - (1 << 64) if number >= 1 << 63 else number


SMALL = [geometry for geometry in GEOMETRIES if "80" not in geometry.name]


@pytest.mark.parametrize("geometry", SMALL, ids=lambda geometry: geometry.name)
def test_what_is_stored_has_the_checksum_of_its_words(
    geometry: Geometry, place: torch.device
) -> None:
    setup = Setup(geometry, place)
    setup.launch(store=True)
    assert setup.stored() == setup.expected()
    runs = [(run[2], run[3]) for run in setup.runs.tolist()]
    blocks = setup.slots[setup.ids[:, 1]]
    by_torch = checksums_reference(blocks, runs, setup.tiling.word, torch.tensor(SEEDS))
    assert by_torch.tolist() == setup.expected()
    assert setup.wrong() == [0, 0, 0]


UNEQUAL = Geometry(
    "three layers",
    lambda device: {
        "a": dense((7, 96), torch.int16, device),
        "b": dense((7, 40), torch.int16, device),
        "c": strided((7, 3, 8), (40, 12, 1), torch.int32, device),
    },
)


@pytest.mark.parametrize(
    ("tile", "programs"),
    [((4, 8), 2), ((1, 8), 3), ((16, 2), 1), ((16, 4), 64), ((64, 1), 7), ((64, 4), 3)],
)
def test_the_shape_of_a_launch_does_not_matter(
    place: torch.device, tile: tuple[int, int], programs: int
) -> None:
    usual = Setup(UNEQUAL, place)
    words, rows = tile
    chunks = -(-int(usual.runs[:, 3].max()) // (words * usual.tiling.word))
    tiling = replace(usual.tiling, chunk_words=words, chunks_per_run=chunks, rows=rows, num_warps=1)
    setup = Setup(UNEQUAL, place, tiling)
    setup.launch(store=True, programs=programs)
    assert setup.stored() == setup.expected()
    setup.launch(store=False, programs=programs)
    assert setup.sums.verdicts.tolist() == [0, 0, 0]


def test_nor_does_it_who_moves_the_bytes(place: torch.device) -> None:
    """Through a buffer, or a copy engine, whose bytes are only summed up."""
    setup = Setup(UNEQUAL, place)
    setup.launch(store=True)
    expected = setup.stored()
    for way in ("buffer", "engine"):
        setup.sums.checksums.zero_()
        if way == "buffer":
            buffer = torch.zeros_like(setup.slots[:3], device=place)
            setup.launch(store=True, slots=buffer, dense=True)
        else:
            before = setup.slots.clone()
            setup.launch(store=True, copy=False)
            assert torch.equal(setup.slots, before)
        assert setup.stored() == expected, way
    setup.launch(store=False, copy=False)
    assert setup.sums.verdicts.tolist() == [0, 0, 0]


def flip(setup: Setup) -> None:
    setup.slots[1, int(setup.runs[2, 2])] ^= 0x80


def swap_words(setup: Setup) -> None:
    words = setup.slots[1].view(torch.int64)
    words[0], words[1] = words[1].item(), words[0].item()


def swap_pages(setup: Setup) -> None:
    one, other = (slice(start, start + size) for _, _, start, size in setup.runs[2:4].tolist())
    held = setup.slots[1, one].clone()
    setup.slots[1, one] = setup.slots[1, other]
    setup.slots[1, other] = held


def clear(setup: Setup) -> None:
    setup.slots[1].zero_()


def cut_off(setup: Setup) -> None:
    setup.slots[1, int(setup.runs[-1, 2]) + 1 :] = 0


def other_block(setup: Setup) -> None:
    setup.slots[1] = setup.slots[3]


def other_block_with_its_checksum(setup: Setup) -> None:
    other_block(setup)
    setup.sums.checksums[:, 1] = setup.sums.checksums[:, 3]


def other_key(setup: Setup) -> None:
    setup.ids[1, 2] += 1


CORRUPTIONS = [
    flip,
    swap_words,
    swap_pages,
    clear,
    cut_off,
    other_block,
    other_block_with_its_checksum,
    other_key,
]


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
def test_a_wrong_byte_is_found_in_its_block(
    corrupt: Callable[[Setup], None], place: torch.device
) -> None:
    setup = Setup(UNEQUAL, place)
    setup.launch(store=True)
    corrupt(setup)
    right = setup.block(0), setup.block(2)
    assert setup.wrong() == [0, 1, 0]
    assert not setup.block(1).any()
    assert all(map(torch.equal, (setup.block(0), setup.block(2)), right))


@pytest.mark.parametrize("part_runs", [1, 2, 3, 4])
@pytest.mark.parametrize("programs", [1, 3])
def test_every_part_has_the_checksum_of_all_that_comes_before_its_end(
    place: torch.device, part_runs: int, programs: int
) -> None:
    setup = Setup(UNEQUAL, place, part_runs=part_runs)
    setup.launch(store=True, programs=programs)
    for part in range(setup.num_parts):
        runs = setup.runs[: (part + 1) * part_runs]
        kept = setup.sums.checksums[part, setup.ids[:, 1]].tolist()
        assert kept == setup.expected(runs)
    assert setup.wrong() == [0, 0, 0]
    setup.load_parts(list(range(setup.num_parts)))
    setup.load_parts([*range(1, setup.num_parts - 1, 2), setup.num_parts - 1])
    assert setup.sums.verdicts.tolist() == [0, 0, 0]


def test_what_arrives_in_parts_is_cleared_from_the_first_wrong_one_on(place: torch.device) -> None:
    setup = Setup(UNEQUAL, place, part_runs=1)
    setup.launch(store=True)
    stored = setup.block(1)
    flip(setup)  # in the third run, of five
    setup.load_parts([0, 1])
    assert setup.sums.verdicts.tolist() == [0, 0, 0]
    setup.of_loads.zero_()
    setup.load_parts([1, 2, 3, 4])
    assert setup.sums.verdicts.tolist() == [0, 1, 0]
    first = int(setup.runs[2, 2])
    assert torch.equal(setup.block(1)[:first], stored[:first])
    assert not setup.block(1)[first:].any()


def test_a_verdict_stays_until_somebody_read_it(place: torch.device) -> None:
    setup = Setup(UNEQUAL, place)
    setup.launch(store=True)
    setup.sums.verdicts[2] = 1
    setup.launch(store=False)
    assert setup.sums.verdicts.tolist() == [0, 0, 1]


def test_no_blocks_have_no_checksum(place: torch.device) -> None:
    setup = Setup(UNEQUAL, place)
    setup.ids = setup.ids[:0]
    setup.launch(store=True)
    assert not setup.sums.checksums.any()


def test_many_blocks_are_finished_too(place: torch.device) -> None:
    """More than are finished at a time, by more programs than there is work for some."""
    layout = make_layout({"a": dense((1200, 4), torch.int16, place)})
    runs = layout.run_table()
    count, device = 1100, layout.device
    order = torch.randperm(1200)[:count]
    ids = pinned(torch.stack([order, order.flip(0), order * 11], dim=1), device)
    slots = pinned(torch.zeros(1200, layout.slot_bytes, dtype=torch.uint8), device)
    sums = Sums(
        torch.zeros(count, 2, dtype=torch.int64, device=device),
        pinned(torch.zeros(1, 1200, dtype=torch.int64), device),
        pinned(torch.zeros(count, dtype=torch.int8), device),
    )
    tiling = tiling_of(runs, layout.slot_bytes)
    paged_copy(runs.to(device), ids, slots, count, tiling, store=True, programs=5, sums=sums)
    if device.type == "cuda":
        torch.cuda.synchronize()
    spans = [(run[2], run[3]) for run in runs.tolist()]
    expected = checksums_reference(slots[ids[:, 1]], spans, tiling.word, ids[:, 2])
    assert torch.equal(sums.checksums[0, ids[:, 1]], expected)


@pytest.mark.fuzz
@given(data=st.data())
def test_two_different_blocks_differ(data: st.DataObject) -> None:
    """Of the reference, which the kernel equals: any edit of few words, wherever they are."""
    words = data.draw(st.lists(st.sampled_from([0, 1, -1, 1 << 62, -(1 << 63)]), min_size=2))
    edits = data.draw(st.permutations(words) | st.lists(st.integers(-(1 << 63), (1 << 63) - 1)))
    other = (edits + words[len(edits) :])[: len(words)]
    seeds = torch.zeros(1, dtype=torch.int64)

    def checksum(numbers: list[int]) -> int:
        block = torch.tensor([numbers]).view(torch.uint8)
        return int(checksums_reference(block, [(0, 8 * len(numbers))], 8, seeds))

    assert (checksum(words) == checksum(other)) == (words == other)
