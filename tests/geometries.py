"""KV tensors in the geometries of vLLM, and where their bytes lie, found independently.

Every tensor lies in memory full of noise with more noise around it, so that a comparison of whole
allocations shows each byte that was touched and should not have been.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Tensors = dict[str, torch.Tensor]
ORDERS_033 = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]


def noise(nbytes: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Random bytes, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=draw).to(device)


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's whole allocation as uint8, also what lies outside of the tensor."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage())


def strided(
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    offset: int = 0,
    seed: int = 0,
) -> torch.Tensor:
    """A tensor in its own noisy allocation; strides and offset in elements."""
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    backing = noise((last + 1 + 5) * dtype.itemsize, device, seed).view(dtype)
    return backing.as_strided(shape, strides, offset)


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    return [prod(shape[i + 1 :]) for i in range(len(shape))]


def dense(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> torch.Tensor:
    return strided(shape, contiguous_strides(shape), dtype, device, seed=seed)


def nhd(b: int, n: int, h: int, c: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """vLLM 0.26's default: logically (B, H, N, C), tokens outermost in memory."""
    return dense((b, n, h, c), dtype, device).permute(0, 2, 1, 3)


def one_backing(order: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """vLLM 0.33: layers as views of one allocation, (B, H, N, C) each, in any physical order."""
    sizes = {"L": 3, "B": 5, "H": 2, "N": 4, "C": 6}
    whole = noise(prod(sizes.values()) * dtype.itemsize + 64, device).view(dtype)[16:]
    whole = whole.as_strided(
        shape := [sizes[letter] for letter in order], contiguous_strides(shape), 16
    )
    permuted = whole.permute([order.index(letter) for letter in "LBHNC"])
    return {f"layer{i}": permuted[i] for i in range(sizes["L"])}


@dataclass(frozen=True)
class Geometry:
    """A named way to make KV tensors; `num_blocks` None means dimension 0."""

    name: str
    make: Callable[[torch.device], Tensors]
    num_blocks: int | None = None


def many_layers(count: int) -> Callable[[torch.device], Tensors]:
    return lambda device: {
        f"layer{i}": dense((4, 3, 5), torch.float16, device, seed=i) for i in range(count)
    }


def unequal_layers(device: torch.device) -> Tensors:
    return {
        "wide": dense((6, 10, 9), torch.float32, device, seed=1),
        "narrow": dense((6, 3), torch.int8, device, seed=2),
        "holed": strided((6, 3, 4), (40, 12, 1), torch.float16, device, seed=3),
    }


def odd_bytes(device: torch.device) -> Tensors:
    return {"odd": strided((7, 3, 5), (41, 11, 1), torch.int8, device, offset=3)}


def shared_layers(device: torch.device) -> Tensors:
    first = dense((5, 4, 6), torch.bfloat16, device)
    return {"first": first, "same": first, "same permuted": first.permute(0, 2, 1)}


def _nhd_of(dtype: torch.dtype, device: torch.device) -> Tensors:
    return {"a": nhd(5, 3, 2, 14, dtype, device)}


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8]
GEOMETRIES = [
    *(Geometry(f"NHD {dtype}", partial(_nhd_of, dtype)) for dtype in DTYPES),
    Geometry("HND", lambda device: {"a": dense((5, 2, 3, 14), torch.bfloat16, device)}),
    *(Geometry(f"0.33 {order}", partial(one_backing, order)) for order in ORDERS_033),
    Geometry("MLA", lambda device: {"a": dense((9, 3, 37), torch.float16, device)}),
    Geometry("kernel blocks", lambda device: {"a": dense((12, 2, 3, 4), torch.float16, device)}, 4),
    Geometry("kernel blocks NHD", lambda device: {"a": nhd(6, 5, 3, 4, torch.float16, device)}, 2),
    Geometry(
        "kernel blocks with holes",
        lambda device: {"a": strided((6, 5), (9, 1), torch.float32, device, offset=1)},
        3,
    ),
    Geometry("blocks innermost", lambda d: {"a": dense((3, 4, 5), torch.int8, d).permute(2, 0, 1)}),
    Geometry("one block", lambda device: {"a": dense((1, 7), torch.float32, device)}),
    Geometry("one element", lambda device: {"a": dense((4,), torch.int8, device)}),
    Geometry("1 layer", many_layers(1)),
    Geometry("80 layers", many_layers(80)),
    Geometry("unequal layers", unequal_layers),
    Geometry("odd bytes", odd_bytes),
    Geometry("shared layers", shared_layers),
]


@st.composite
def any_geometry(draw: st.DrawFn) -> Geometry:
    """One to three tensors whose dimensions nest in drawn orders, with drawn gaps."""
    num_blocks = draw(st.integers(1, 4))
    shapes = [draw(_shape_and_strides(num_blocks)) for _ in range(draw(st.integers(1, 3)))]
    kinds = st.sampled_from([torch.int8, torch.bfloat16, torch.float32, torch.float64])
    rest = [(draw(kinds), draw(st.integers(0, 5))) for _ in shapes]

    def make(device: torch.device) -> Tensors:
        return {
            str(i): strided(*shape, dtype, device, offset=offset, seed=i)
            for i, (shape, (dtype, offset)) in enumerate(zip(shapes, rest, strict=True))
        }

    return Geometry("drawn", make, num_blocks)


@st.composite
def _shape_and_strides(draw: st.DrawFn, num_blocks: int) -> tuple[list[int], list[int]]:
    inner = draw(st.lists(st.integers(1, 4), max_size=3))
    shape = [num_blocks * draw(st.integers(1, 3)), *inner]
    strides, extent = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        strides[dim] = extent + draw(st.sampled_from([0, 0, 1, 5]))
        extent = strides[dim] * shape[dim]
    return shape, strides


def byte_positions(tensor: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
    """Per block, where its bytes lie in the tensor's allocation, ascending.

    Found by looking at an allocation in which every element holds its own number.
    """
    item = tensor.element_size()
    numbers = torch.arange(tensor.untyped_storage().nbytes() // item)
    seen = numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    blocks = [part.flatten().sort().values for part in seen.chunk(num_blocks)]
    return [(part[:, None] * item + torch.arange(item)).flatten() for part in blocks]


def distinct(tensors: Tensors) -> list[torch.Tensor]:
    """One tensor for each set of bytes; layers that share a cache count once."""
    found: dict[tuple[int, ...], torch.Tensor] = {}
    for tensor in tensors.values():
        shape = sorted(zip(tensor.stride(), tensor.shape, strict=True))
        found.setdefault((tensor.data_ptr(), *(n for dim in shape for n in dim)), tensor)
    return list(found.values())


def naive_copy(
    tensors: Tensors,
    num_blocks: int,
    moves: Sequence[tuple[int, int]],
    host: torch.Tensor,
    *,
    store: bool,
) -> None:
    """What a copy must do, in plain loops: bytes by ascending address, pages aligned to 16."""
    at = 0
    for tensor in distinct(tensors):
        positions, memory = byte_positions(tensor, num_blocks), memory_of(tensor)
        size = len(positions[0])
        for block, slot in moves:
            where = positions[block].to(memory.device)
            if store:
                host[slot, at : at + size] = memory[where].to(host.device)
            else:
                memory[where] = host[slot, at : at + size].to(memory.device)
        at += -(-size // 16) * 16
