"""What comes back is what was stored, or is found not to be: on every path, and nothing else is."""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from geometries import GEOMETRIES, Geometry, dense
from hypothesis import given
from hypothesis import strategies as st

from kvortex.checksum import checksum_of, combine, digest_pieces, num_pieces, seed_of, signed
from kvortex.core import Direction
from kvortex.host_pool import HostPool
from kvortex.layout import make_layout
from kvortex.triton_kernels.reference import paged_copy_reference
from kvortex.verification import ONE_IN, Sampling, verification_of
from kvortex.worker import open_copy_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvortex.copy_engine import CopyEngine
    from kvortex.verification import Verify

STORE, LOAD = Direction.STORE, Direction.LOAD
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
only_cuda = pytest.mark.parametrize(
    "device",
    [pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])],
    indirect=True,
)
SLEEP_CYCLES = 100_000_000
"""About 0.05 s of a GPU."""


class Setup:
    """An engine that verifies, and each block of its KV tensors in the slot of the same number."""

    def __init__(
        self,
        stack: ExitStack,
        kv: dict[str, torch.Tensor],
        num_blocks: int | None = None,
        verify: Verify = "always",
    ) -> None:
        self.kv = kv
        self.layout = make_layout(kv, num_blocks)
        on_gpu = self.layout.device.type == "cuda"
        blocks = self.layout.num_blocks
        parts = len(self.layout.parts()) if on_gpu else 1
        self.pool = HostPool(blocks, self.layout.slot_bytes, pinned=on_gpu, num_parts=parts)
        stack.callback(self.pool.close)
        verification = verification_of(self.layout, verify)
        self.engine: CopyEngine = open_copy_engine(self.layout, self.pool, 4, verification)
        stack.callback(self.engine.close)
        self.pool.bytes.fill_(0xEE)
        self.blocks = np.arange(blocks)
        self.seeds = np.array([seed_of(b"%d" % i) for i in self.blocks])
        assert self.engine.copy(STORE, self.blocks, self.blocks, self.seeds).wait()

    def bad(self, slots: np.ndarray | None = None, *, by_layer: bool = False) -> list[int]:
        """Blocks that are found to be wrong when all are loaded."""
        where = self.blocks, self.blocks if slots is None else slots, self.seeds
        ticket = self.engine.load_layers(*where)[-1] if by_layer else self.engine.copy(LOAD, *where)
        assert ticket.wait()
        return sorted(ticket.bad_block_ids)

    def packed(self) -> torch.Tensor:
        """What the KV tensors hold, packed like slots."""
        slots = torch.zeros_like(self.pool.bytes)
        ids = torch.from_numpy(self.blocks)
        pages = [(page.view, page.slot_offset) for page in self.layout.pages]
        paged_copy_reference(pages, ids, ids, slots, store=True)
        return slots

    def places(self) -> list[int]:
        """Bytes of a slot that hold something."""
        held = [range(p.slot_offset, p.slot_offset + p.nbytes) for p in self.layout.pages]
        return [place for part in held for place in part]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """Small blocks also consist of parts, and are loaded part by part."""
    monkeypatch.setattr("kvortex.layout.LEAST_PART_BYTES", 1)
    if torch.cuda.is_available():
        monkeypatch.setattr("kvortex.cuda_copy_engine.LAUNCH_BYTES", 1)
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: geometry.name)
def test_each_kind_of_corruption_is_found(
    geometry: Geometry, device: torch.device, opened: ExitStack
) -> None:
    setup = Setup(opened, geometry.make(device), geometry.num_blocks)
    slots, places = setup.pool.bytes, setup.places()
    draw = random.Random(geometry.name)
    assert setup.bad() == setup.bad(by_layer=True) == []
    block = draw.randrange(len(setup.blocks))
    good = slots.clone()
    in_kv = setup.packed()

    place = draw.choice(places)
    slots[block, place] ^= 1 << draw.randrange(8)
    assert setup.bad() == setup.bad(by_layer=True) == [block]
    in_kv_now = setup.packed()
    assert in_kv_now[block, places[-1]] == 0  # cleared from the part with that bit on
    assert [n for n, (a, b) in enumerate(zip(in_kv, in_kv_now, strict=True)) if not a.equal(b)] in (
        [block],
        [],  # if it was all zeros there
    )
    assert setup.bad() == [block]
    assert not setup.packed()[block].any()
    slots.copy_(good)
    assert setup.bad() == []

    pairs = [(a, b) for a, b in pairwise(places) if slots[block, a] != slots[block, b]]
    if pairs:
        one, other = draw.choice(pairs)
        slots[block, [one, other]] = slots[block, [other, one]]
        assert setup.bad() == [block]
        slots.copy_(good)

    slots[block, places[len(places) // 2] :] ^= 0xFF
    assert setup.bad() == setup.bad(by_layer=True) == [block]
    slots.copy_(good)

    setup.seeds[block] ^= 1 << draw.randrange(63)
    assert setup.bad() == setup.bad(by_layer=True) == [block]


@pytest.mark.parametrize("by_layer", [False, True])
def test_layers_blocks_and_generations_are_told_apart(
    by_layer: bool, device: torch.device, opened: ExitStack
) -> None:
    kv = {name: dense((6, 3, 64), torch.bfloat16, device, seed=ord(name)) for name in "abc"}
    setup = Setup(opened, kv)
    slots, good = setup.pool.bytes, setup.pool.bytes.clone()
    checksums = setup.pool.checksums.clone()
    page = setup.layout.pages[0].nbytes
    slots[2, : 2 * page] = slots[2, : 2 * page].view(2, page).flip(0).flatten()
    assert setup.bad(by_layer=by_layer) == [2]
    slots.copy_(good)
    swapped = setup.blocks.copy()
    swapped[[1, 4]] = [4, 1]
    assert setup.bad(swapped, by_layer=by_layer) == [1, 4]
    kv["b"][3] += 1
    assert setup.engine.copy(STORE, setup.blocks, setup.blocks, setup.seeds).wait()
    assert (setup.pool.checksums != checksums).nonzero().flatten().tolist() == [1, 3, 4]
    slots[3] = good[3]  # as if the newer store had not arrived
    assert setup.bad(by_layer=by_layer) == [3]


@pytest.mark.parametrize("cases", [3000, pytest.param(1_000_000, marks=[pytest.mark.gpu, NO_CUDA])])
def test_a_flipped_bit_is_never_missed(cases: int, device: torch.device, opened: ExitStack) -> None:
    if (device.type == "cuda") != (cases > 3000):
        pytest.skip("the other device's number of cases")
    blocks = 1000 if device.type == "cpu" else 50_000
    kv = {name: dense((blocks, 40), torch.uint8, device, seed=ord(name)) for name in "abcd"}
    setup = Setup(opened, kv)
    places, draw = np.array(setup.places()), np.random.default_rng(1)
    memory = setup.pool.bytes.numpy()
    for _ in range(cases // blocks):
        at = draw.choice(places, blocks)
        memory[setup.blocks, at] ^= (1 << draw.integers(8, size=blocks)).astype(np.uint8)
        setup.engine.copy(LOAD, setup.blocks[:1], setup.blocks[:1], setup.seeds[:1]).wait()
        assert setup.bad() == setup.blocks.tolist()
        setup.seeds = draw.integers(-(1 << 63), (1 << 63) - 1, size=blocks)
        assert setup.engine.copy(STORE, setup.blocks, setup.blocks, setup.seeds).wait()
        assert setup.bad() == []


def test_another_layout_finds_nothing_right(device: torch.device, opened: ExitStack) -> None:
    kv = {name: dense((4, 2, 8), torch.bfloat16, device) for name in "ab"}
    setup = Setup(opened, kv)
    assert setup.engine.verification is not None
    other = replace(
        setup.engine.verification, fingerprint=setup.engine.verification.fingerprint + 1
    )
    setup.engine.verification = other
    assert setup.bad() == setup.blocks.tolist()


def test_a_fingerprint_is_of_all_that_gives_bytes_a_meaning() -> None:
    def fingerprint(make: object = torch.bfloat16, *shape: int, name: str = "a") -> int:
        assert isinstance(make, torch.dtype)
        layout = make_layout({name: torch.zeros(8, *(shape or (2, 16)), dtype=make)})
        return verification_of(layout, "always").fingerprint

    strided = torch.zeros(8, 16, 2, dtype=torch.bfloat16).transpose(1, 2)
    found = [
        fingerprint(),
        fingerprint(torch.float16),
        fingerprint(torch.bfloat16, 16, 2),
        fingerprint(name="b"),
        verification_of(make_layout({"a": strided}), "always").fingerprint,
        verification_of(make_layout({"a": strided}, 4), "always").fingerprint,
        verification_of(make_layout({"a": strided}, 4), "always", b"weights").fingerprint,
    ]
    assert len(set(found)) == len(found)
    more = make_layout({"a": torch.zeros(99, 2, 16, dtype=torch.bfloat16)})
    assert verification_of(more, "off").fingerprint == found[0]


def test_who_asks_for_nothing_gets_no_checksum(device: torch.device, opened: ExitStack) -> None:
    setup = Setup(opened, {"a": dense((4, 16), torch.uint8, device)}, verify="off")
    assert setup.pool.checksums.eq(0).all()
    setup.pool.bytes[1] ^= 1
    assert setup.bad() == []


def test_of_sampled_loads_one_in_so_many_is_compared_until_one_was_wrong(
    device: torch.device, opened: ExitStack
) -> None:
    setup = Setup(opened, {"a": dense((4, 16), torch.uint8, device)}, verify="sampled")
    assert setup.bad() == []  # its turn comes again after ONE_IN
    setup.pool.bytes[1] ^= 1
    found = [setup.bad() for _ in range(3 * ONE_IN)]
    first = found.index([1])  # an engine of a GPU has loaded something before, to warm up
    assert found == [[]] * first + [[1]] * (3 * ONE_IN - first)
    assert 0 < first < ONE_IN


@pytest.mark.parametrize("mode", ["always", "sampled", "off"])
def test_turns_are_of_the_ways_they_name(mode: Verify) -> None:
    verification = replace(
        verification_of(make_layout({"a": torch.zeros(2, 8)}), "always"), mode=mode
    )
    for way in Direction:
        sampling = Sampling(verification)
        assert {sampling.next(way) for _ in range(ONE_IN + 1)} == sampling.ways(way)
        sampling.found_wrong()
        assert {sampling.next(way) for _ in range(ONE_IN + 1)} == {mode != "off"}


@pytest.mark.fuzz
@given(
    block=st.binary(min_size=1, max_size=300),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    cuts=st.lists(st.integers(0, 5), max_size=4),
)
def test_a_checksum_in_parts_is_that_of_the_whole(block: bytes, seed: int, cuts: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvortex.checksum.PIECE_BYTES", 64)
        digests = [0] * num_pieces(len(block))
        edges = sorted({0, len(digests), *(cut for cut in cuts if cut < len(digests))})
        for first, end in reversed(list(pairwise(edges))):
            digest_pieces(memoryview(block), digests, first, end)
        whole = checksum_of(memoryview(block), seed)
        assert combine(digests, seed) == whole
        assert combine(digests, seed ^ 1) != whole
        assert signed(whole) % (1 << 64) == whole


@only_cuda
@pytest.mark.parametrize("mover", ["zero-copy", "staged", "dma"])
@pytest.mark.parametrize("page", [24, 4096, 40_000])
def test_every_mover_finds_the_same(mover: str, page: int, device: torch.device) -> None:
    from kvortex.tune import rig

    with rig(device, page, page * 50_000) as machine:
        draw = np.random.default_rng(page)
        machine.slots = draw.permutation(machine.num_blocks)
        store, load = (machine.lane(way, mover, 8) for way in (STORE, LOAD))
        assert machine.start(store).wait()
        assert machine.start(load).wait()
        again = machine.start(load)
        assert again.wait()
        assert again.bad_block_ids == []
        wrong = draw.choice(machine.num_blocks, 9, replace=False)
        slots = machine.pool.bytes.numpy()
        slots[machine.slots[wrong], draw.integers(page, size=9)] ^= 4
        ticket = machine.start(load)
        assert ticket.wait()
        assert sorted(ticket.bad_block_ids) == sorted(machine.block_ids[wrong].tolist())
        for kv in machine.kv_caches.values():
            assert not kv[machine.block_ids[wrong]].any()


@only_cuda
@pytest.mark.parametrize("by_layer", [False, True])
def test_a_load_without_a_kernel_is_verified_too(
    by_layer: bool, device: torch.device, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(opened, {name: dense((9, 40), torch.int16, device) for name in "ab"})
    setup.pool.bytes[3, 7] ^= 1

    def broken(*_: object, **__: object) -> None:
        raise MemoryError("no room for the kernel")

    with monkeypatch.context() as patch:
        patch.setattr("kvortex.paged_kernel.PagedKernel.launch", broken)
        assert setup.bad(by_layer=by_layer) == [3]
    assert setup.bad() == [3]


@only_cuda
@pytest.mark.parametrize("verify", ["always", "off"])
@pytest.mark.parametrize("count", [1, 64])
def test_a_store_and_what_comes_before_and_after_it(
    verify: Verify, count: int, device: torch.device, opened: ExitStack
) -> None:
    """A slow kernel computes the blocks, they are stored, used again at once, and loaded into while
    another store of them runs: never a wrong byte, whether or not anybody compares."""
    kv = torch.zeros(64, 32 << 10, dtype=torch.uint8, device=device)
    setup = Setup(opened, {"a": kv}, verify=verify)
    engine, some = setup.engine, np.arange(count)
    spare = some + 0 if count > 32 else some + 32
    for number in range(1, 25):
        torch.cuda._sleep(SLEEP_CYCLES // 10)
        kv[:count] = number  # computed late
        stored = engine.copy(STORE, some, some, setup.seeds[:count])
        engine.fence(stored)  # as vLLM, which holds the blocks until the store has ended
        kv[:count] = 0xEE  # the next request's
        later = engine.copy(STORE, some, spare, setup.seeds[:count])
        engine.fence(later)
        loaded = engine.copy(LOAD, some, some if count <= 32 else spare, setup.seeds[:count])
        engine.fence(loaded)
        expected = number if count <= 32 else 0xEE
        assert kv[:count].eq(expected).all()
        assert loaded.wait()
        assert list(loaded.bad_block_ids) == []
