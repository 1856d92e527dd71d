"""Layout: where each page of a KV block lies on the GPU and in a host slot, from strides alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from math import prod
from typing import TYPE_CHECKING

import torch

from kvortex.core import LayoutError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PAGE_ALIGNMENT = 16
"""Every page starts at a multiple of this in its slot, so that 16-byte accesses stay possible."""
MOST_PARTS = 16
LEAST_PART_BYTES = 128 << 10
"""Of a block, in parts that are loaded, waited for and compared one by one."""


@dataclass(frozen=True, slots=True)
class Page:
    """One layer's share of every block, as bytes.

    `view` is a uint8 view of the layer's memory, shape (num_blocks, *runs, run_bytes); the last
    dimension is contiguous. `slot_offset` is where the page starts in a slot, packed. `form` is
    what its bytes mean: type, shape of a block, and in which order its dimensions lie in memory.
    """

    name: str
    view: torch.Tensor
    slot_offset: int
    form: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the page in one block."""
        return self.view[0].numel()

    def runs(self) -> Iterator[tuple[int, int, int, int]]:
        """(address in block 0, block stride, offset in a slot, bytes) of every contiguous run."""
        *outer, run_bytes = self.view.shape[1:]
        block_stride, *strides, _ = self.view.stride()
        for number, where in enumerate(product(*(range(size) for size in outer))):
            start = sum(i * stride for i, stride in zip(where, strides, strict=True))
            offset = self.slot_offset + number * run_bytes
            yield self.view.data_ptr() + start, block_stride, offset, run_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """All pages of a block over all layers; a slot holds them one after the other.

    `pages_of` names the pages of each layer by their number; layers that share one KV cache have
    the same.
    """

    pages: tuple[Page, ...]
    num_blocks: int
    slot_bytes: int
    pages_of: Mapping[str, tuple[int, ...]]

    @property
    def device(self) -> torch.device:
        """Where the KV tensors are."""
        return self.pages[0].view.device

    def fingerprint(self) -> bytes:
        """Names what the bytes of a slot mean; equal on two machines whatever else differs."""
        told = [(page.name, page.slot_offset, page.form) for page in self.pages]
        return repr((self.slot_bytes, told)).encode()

    def run_table(self) -> torch.Tensor:
        """int64 tensor (runs, 4) on the CPU: the rows of `Page.runs` over all pages."""
        return torch.tensor([run for page in self.pages for run in page.runs()], dtype=torch.int64)

    def page_runs(self) -> list[range]:
        """The rows of the run table that belong to each page."""
        ends = list(accumulate(prod(page.view.shape[1:-1]) for page in self.pages))
        return [range(start, end) for start, end in pairwise([0, *ends])]

    def parts(self) -> list[range]:
        """The rows of the run table that are loaded, waited for and compared together."""
        num_runs = self.page_runs()[-1].stop
        size = runs_of_a_part(num_runs, self.slot_bytes)
        return [range(row, min(row + size, num_runs)) for row in range(0, num_runs, size)]

    def stretch_bytes(self) -> int:
        """Bytes that lie side by side both in a block and in a slot, on the average."""
        runs = sorted(run for page in self.pages for run in page.runs())
        breaks = sum(
            (one[0] + one[3], one[2] + one[3]) != (other[0], other[2])
            for one, other in pairwise(runs)
        )
        return sum(run[3] for run in runs) // (breaks + 1)


def make_layout(
    kv_caches: Mapping[str, torch.Tensor | Sequence[torch.Tensor]], num_blocks: int | None = None
) -> Layout:
    """Derive the geometry of the KV tensors of one KV cache group.

    Args:
        kv_caches: layer name to tensor (or several), any shape and strides, dimension 0 the block.
            Where dimension 0 is k times `num_blocks`, each block is k adjacent kernel blocks.
        num_blocks: blocks of the group; by default dimension 0, which is then equal in all tensors.

    Raises:
        LayoutError: no tensors, several devices, or a geometry that cannot be copied by blocks.
    """
    owners = [(layer, *part) for layer, value in kv_caches.items() for part in _parts(layer, value)]
    named = [(name, tensor) for _, name, tensor in owners]
    if not named:
        raise LayoutError("no KV tensors to work on: kv_caches is empty")
    blocks = num_blocks if num_blocks is not None else _common_blocks(named)
    pages: list[Page] = []
    numbers: dict[tuple[object, ...], int] = {}
    pages_of: dict[str, tuple[int, ...]] = {}
    end = 0
    for layer, name, tensor in owners:
        view = _byte_view(name, tensor, blocks)
        identity = (view.data_ptr(), view.shape, view.stride())
        if identity not in numbers:  # layers may share one KV cache
            numbers[identity] = len(pages)
            pages.append(Page(name, view, end, _form(tensor, blocks)))
            end += -(-pages[-1].nbytes // PAGE_ALIGNMENT) * PAGE_ALIGNMENT
        pages_of[layer] = (*pages_of.get(layer, ()), numbers[identity])
    _require_one_device(pages)
    return Layout(tuple(pages), blocks, end, pages_of)


def _parts(
    layer: str, value: torch.Tensor | Sequence[torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield layer, value
    else:
        yield from ((f"{layer}[{i}]", tensor) for i, tensor in enumerate(value))


def _common_blocks(named: list[tuple[str, torch.Tensor]]) -> int:
    sizes = {tuple(tensor.shape[:1]): name for name, tensor in named}
    if len(sizes) > 1 or () in sizes:
        shown = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named)
        raise LayoutError(f"dimension 0, the block, must be equal in all tensors: {shown}")
    return named[0][1].shape[0]


def _byte_view(name: str, tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The tensor's memory as uint8 (num_blocks, *runs, run_bytes), outermost run first."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise LayoutError(f"{name}: shape {tuple(tensor.shape)}, {tensor.layout}: not plain memory")
    shown = f"{name}: shape {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype}"
    if num_blocks < 1 or tensor.dim() < 1 or tensor.numel() == 0 or tensor.shape[0] % num_blocks:
        raise LayoutError(f"{shown}: dimension 0 must be a multiple of {num_blocks} blocks")
    if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
        raise LayoutError(f"{shown}: elements share memory")
    item = tensor.element_size()
    per_block = tensor.shape[0] // num_blocks
    block_stride = tensor.stride(0) * item * per_block
    dims = [(tensor.stride(0) * item, per_block)]
    dims += [(s * item, n) for s, n in zip(tensor.stride()[1:], tensor.shape[1:], strict=True)]
    dims = sorted(dim for dim in dims if dim[1] > 1)
    run_bytes = item
    while dims and dims[0][0] == run_bytes:
        run_bytes *= dims.pop(0)[1]
    _require_disjoint(shown, [*dims, (block_stride, num_blocks)], run_bytes)
    strides = [block_stride, *(stride for stride, _ in reversed(dims)), 1]
    shape = [num_blocks, *(size for _, size in reversed(dims)), run_bytes]
    storage = tensor.untyped_storage()
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return view.set_(storage, tensor.storage_offset() * item, shape, strides)


def _form(tensor: torch.Tensor, num_blocks: int) -> str:
    """Strides themselves depend on how many blocks there are."""
    order = sorted(range(1, tensor.dim()), key=tensor.stride().__getitem__)
    return f"{tensor.dtype} {tensor.shape[0] // num_blocks} {tuple(tensor.shape[1:])} {order}"


def runs_of_a_part(num_runs: int, slot_bytes: int) -> int:
    """How many rows of a run table are a part of a block; the last part may have fewer."""
    parts = max(1, min(MOST_PARTS, slot_bytes // LEAST_PART_BYTES))
    return -(-num_runs // parts)


def common_word(runs: torch.Tensor, slot_bytes: int) -> int:
    """The largest of 8, 4, 2, 1 that divides every number in a run table and the slot size."""
    bits = slot_bytes | 8
    for number in runs.flatten().tolist():
        bits |= number
    return bits & -bits


def _require_disjoint(shown: str, dims: list[tuple[int, int]], run_bytes: int) -> None:
    """Sorted by stride, each dimension must step over all that lies below it."""
    extent = run_bytes
    for stride, size in sorted(dim for dim in dims if dim[1] > 1):
        if stride < extent:
            raise LayoutError(f"{shown}: blocks or their parts overlap in memory")
        extent += stride * (size - 1)


def _require_one_device(pages: list[Page]) -> None:
    devices = {page.view.device for page in pages}
    if len(devices) > 1:
        raise LayoutError(f"KV tensors on several devices: {sorted(map(str, devices))}")
    if pages[0].view.is_meta:
        raise LayoutError("KV tensors on the meta device have no memory")
