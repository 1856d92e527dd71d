"""Layout finds every byte of every block, from strides alone, and refuses what it cannot copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from geometries import (
    GEOMETRIES,
    ORDERS_033,
    Geometry,
    any_geometry,
    byte_positions,
    dense,
    distinct,
    nhd,
    one_backing,
    strided,
)
from hypothesis import given

from kvortex.core import LayoutError
from kvortex.layout import PAGE_ALIGNMENT, Layout, Page, make_layout

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")


def bytes_by_run(page: Page, tensor: torch.Tensor, block: int) -> list[int]:
    """Positions in the tensor's allocation that the runs of a block name, in slot order."""
    base = tensor.untyped_storage().data_ptr()
    runs = sorted(page.runs(), key=lambda run: run[2])
    found: list[int] = []
    for address, stride, _, size in runs:
        start = address + block * stride - base
        found += range(start, start + size)
    return found


def check_layout(layout: Layout, tensors: dict[str, torch.Tensor], num_blocks: int) -> None:
    own = distinct(tensors)
    assert len(layout.pages) == len(own)
    assert layout.num_blocks == num_blocks
    for page, tensor in zip(layout.pages, own, strict=True):
        expected = [positions.tolist() for positions in byte_positions(tensor, num_blocks)]
        found = [bytes_by_run(page, tensor, block) for block in range(num_blocks)]
        assert found == expected
        assert page.nbytes == len(expected[0])
    check_slots(layout)


def check_slots(layout: Layout) -> None:
    taken = sorted((at, size) for page in layout.pages for _, _, at, size in page.runs())
    end = 0
    for at, size in taken:
        assert at >= end
        end = at + size
    assert end <= layout.slot_bytes
    assert all(page.slot_offset % PAGE_ALIGNMENT == 0 for page in layout.pages)
    assert layout.slot_bytes % PAGE_ALIGNMENT == 0
    assert sum(size for _, size in taken) == sum(page.nbytes for page in layout.pages)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: geometry.name)
def test_names_every_byte_once(geometry: Geometry, device: torch.device) -> None:
    tensors = geometry.make(device)
    num_blocks = geometry.num_blocks or next(iter(tensors.values())).shape[0]
    check_layout(make_layout(tensors, geometry.num_blocks), tensors, num_blocks)


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_tensors_of_unequal_dimension_0_are_refused_in_any_order(names: str) -> None:
    tensors = {name: torch.zeros(6 if name == "a" else 3, 8) for name in names}
    with pytest.raises(LayoutError, match=r"dimension 0, the block, must be equal.*a \(6, 8\)"):
        make_layout(tensors)
    assert make_layout(tensors, 3).num_blocks == 3


@pytest.mark.parametrize("tensor", [torch.tensor(3.0), torch.zeros(4, 4, device="meta")])
def test_tensors_without_blocks_or_memory_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(LayoutError):
        make_layout({"a": tensor})


@pytest.mark.parametrize("order", ORDERS_033)
def test_runs_are_as_long_as_memory_allows(order: str) -> None:
    """One run per page where heads and tokens are inside the block, one per head where not."""
    layout = make_layout(one_backing(order, CPU))
    inner = 4 * 6 * 2
    runs = [list(page.runs()) for page in layout.pages]
    whole = order.index("B") < order.index("H") and order.index("L") < order.index("H")
    assert [len(page) for page in runs] == [1 if whole else 2] * 3
    assert {size for page in runs for *_, size in page} == {2 * inner if whole else inner}


def test_nhd_page_is_one_run() -> None:
    layout = make_layout({"a": nhd(5, 3, 2, 14, torch.bfloat16, CPU)})
    assert layout.run_table().shape == (1, 4)
    assert layout.run_table()[0, 1:].tolist() == [168, 0, 168]


def test_kernel_blocks_join_into_one_run() -> None:
    layout = make_layout({"a": dense((12, 5), torch.int8, CPU)}, 4)
    assert layout.run_table()[:, 1:].tolist() == [[15, 0, 15]]
    assert layout.slot_bytes == 16


def test_kernel_blocks_with_holes_are_runs_of_their_own() -> None:
    layout = make_layout({"a": strided((6, 5), (9, 1), torch.int8, CPU)}, 3)
    assert layout.run_table()[:, 1:].tolist() == [[18, 0, 5], [18, 5, 5]]


def test_shared_layers_take_one_page() -> None:
    tensor = dense((3, 4), torch.int8, CPU)
    layout = make_layout({"a": tensor, "b": tensor, "c": tensor.view(3, 2, 2)})
    assert [page.name for page in layout.pages] == ["a"]


def test_lists_of_tensors_are_pages_each() -> None:
    state = [dense((3, 4), torch.int8, CPU, 1), dense((3, 2, 5), torch.float32, CPU, 2)]
    layout = make_layout({"mamba": state})
    assert [page.name for page in layout.pages] == ["mamba[0]", "mamba[1]"]
    assert [page.slot_offset for page in layout.pages] == [0, 16]
    assert layout.slot_bytes == 16 + 48


def test_stride_of_a_dimension_of_one_says_nothing() -> None:
    tensor = strided((3, 1, 8), (8, 0, 1), torch.int8, CPU)
    assert make_layout({"a": tensor}).run_table()[:, 1:].tolist() == [[8, 0, 8]]


def test_views_alias_the_tensor() -> None:
    tensor = torch.zeros(3, 4, dtype=torch.float32)
    make_layout({"a": tensor}).pages[0].view[1] = 0xFF
    assert tensor.view(torch.uint8)[1].eq(0xFF).all()
    assert tensor.view(torch.uint8)[[0, 2]].eq(0).all()


REFUSED: dict[str, tuple[Callable[[], torch.Tensor], int | None, list[str]]] = {
    "expanded": (
        lambda: torch.zeros(1, 4).expand(3, 4),
        None,
        ["(3, 4)", "(0, 1)", "share memory"],
    ),
    "expanded inside": (lambda: torch.zeros(3, 1).expand(3, 4), None, ["(3, 4)", "(1, 0)"]),
    "overlapping blocks": (
        lambda: torch.zeros(20).as_strided((3, 4), (3, 1)),
        None,
        ["(3, 4)", "(3, 1)", "overlap"],
    ),
    "overlapping parts": (
        lambda: torch.zeros(99).as_strided((3, 4, 5), (30, 4, 1)),
        None,
        ["(3, 4, 5)", "(30, 4, 1)", "overlap"],
    ),
    "not divisible": (lambda: torch.zeros(7, 4), 3, ["(7, 4)", "multiple of 3"]),
    "fewer than the blocks": (lambda: torch.zeros(2, 4), 3, ["(2, 4)", "multiple of 3"]),
    "empty": (lambda: torch.zeros(3, 0), None, ["(3, 0)"]),
    "no blocks": (lambda: torch.zeros(0, 3), None, ["(0, 3)"]),
    "no dimension": (lambda: torch.tensor(1.0), 1, ["()"]),
    "sparse": (lambda: torch.eye(3).to_sparse(), None, ["(3, 3)", "sparse"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_shows_the_geometry(name: str) -> None:
    make, num_blocks, words = REFUSED[name]
    with pytest.raises(LayoutError) as caught:
        make_layout({"model.layers.7": make()}, num_blocks)
    message = str(caught.value)
    assert message.startswith("model.layers.7: ")
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)


def test_no_tensors_are_refused() -> None:
    with pytest.raises(LayoutError, match="empty"):
        make_layout({})


def test_layers_of_unequal_block_counts_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"b: shape \(3, 4\).*multiple of 4"):
        make_layout({"a": torch.zeros(4, 4), "b": torch.zeros(3, 4)}, 4)


def test_several_devices_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"several devices.*cpu.*meta"):
        make_layout({"a": torch.zeros(4, 4), "b": torch.zeros(4, 4, device="meta")})


@pytest.mark.fuzz
@given(geometry=any_geometry())
def test_any_geometry_is_covered_exactly(geometry: Geometry) -> None:
    tensors, num_blocks = geometry.make(CPU), geometry.num_blocks
    assert num_blocks is not None
    check_layout(make_layout(tensors, num_blocks), tensors, num_blocks)
