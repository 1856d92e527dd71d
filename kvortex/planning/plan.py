"""Plan: what the tiers hold of a model's KV cache, and how soon they give it back."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvortex.config import GIB, slots_in_pool
from kvortex.core import shown_bytes
from kvortex.disk.opening import disk_slots_in_pool
from kvortex.doubts import small_disk
from kvortex.planning.blocks import block_shape

if TYPE_CHECKING:
    from kvortex.config import KVortexConfig
    from kvortex.planning.attention import Attention
    from kvortex.planning.blocks import BlockShape

RESTORED = (8 << 10, 32 << 10, 128 << 10)
"""Lengths of prompts whose return is foreseen."""
BATCH = 8192
"""Tokens of a batch, as vLLM serves on large GPUs without being told."""
UNDER_WAY = 2 * BATCH
"""Tokens for which vLLM keeps room beside a window: it prepares a batch while another runs
(`SlidingWindowSpec.max_admission_blocks_per_request` in its v1/kv_cache_interface.py)."""


@dataclass(frozen=True, slots=True)
class Link:
    """Speed of each GPU's link to host memory, and who says so."""

    gb_s: float
    origin: str


@dataclass(frozen=True, slots=True)
class Plan:
    """For one model, on GPUs that have the same of everything.

    `gpu_blocks` is None where the memory of the GPUs was not told.
    """

    model: str
    attention: Attention
    shape: BlockShape
    config: KVortexConfig
    link: Link
    gpu_blocks: int | None
    host_blocks: int
    disk_blocks: int

    @property
    def gpu_tokens(self) -> int | None:
        """How many tokens the GPUs hold in all layers."""
        return None if self.gpu_blocks is None else self.shape.tokens(self.gpu_blocks)

    @property
    def host_tokens(self) -> int:
        """How many the host pool holds in all layers."""
        return self.shape.tokens(self.host_blocks)

    @property
    def disk_tokens(self) -> int:
        """How many the disk pool holds in all layers."""
        return self.shape.tokens(self.disk_blocks)

    @property
    def effective_tokens(self) -> int:
        """How many can return without being computed: a larger tier has what a smaller one has."""
        return max(self.gpu_tokens or 0, self.pooled_tokens)

    @property
    def pooled_tokens(self) -> int:
        """How many return from the pools: the disk holds what memory has as well."""
        return max(self.host_tokens, self.disk_tokens)

    @property
    def windows(self) -> dict[int, int]:
        """Groups of layers by the window through which they look."""
        found: dict[int, int] = {}
        for reach in self.shape.reaches:
            if reach.window is not None:
                found[reach.window] = found.get(reach.window, 0) + 1
        return found

    @property
    def longest_sequence(self) -> int | None:
        """Tokens of the longest sequence that the GPUs have room for, a window's layers keeping
        what they reach and what is under way; None where that is not known, or there is no end."""
        reaches, size, blocks = self.shape.reaches, self.shape.block_tokens, self.gpu_blocks
        if blocks is None or all(reach.window is not None for reach in reaches):
            return None
        kept = [
            None if reach.window is None else -(-(reach.window - 1 + UNDER_WAY) // size)
            for reach in reaches
        ]

        def needed(length: int) -> int:
            """Blocks; one of vLLM's is never used, and a window may begin within one."""
            return 1 + sum(length if most is None else min(length, most) + 1 for most in kept)

        return max(0, bisect_right(range(blocks + 1), blocks, key=needed) - 1) * size

    def restore_seconds(self, tokens: int) -> float:
        """For a prompt of so many tokens that is in host memory; every GPU loads its own part."""
        return self.shape.loaded_bytes(tokens) / (self.link.gb_s * 1e9)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes are of all GPUs together unless they say otherwise."""
        shape, attention = self.shape, self.attention
        gpus = shape.num_gpus
        return {
            "model": self.model,
            "architecture": attention.architecture,
            "layers": len(attention.windows),
            "kv_dtype": attention.dtype,
            "tensor_parallel": gpus,
            "block_tokens": shape.block_tokens,
            "block_bytes_per_gpu": shape.block_bytes,
            "groups": [{"window": reach.window} for reach in shape.reaches],
            "bytes_per_token": shape.bytes_per_token * gpus,
            "bytes_per_token_per_gpu": shape.bytes_per_token,
            "gpu_blocks": self.gpu_blocks,
            "gpu_tokens": self.gpu_tokens,
            "gpu_longest_sequence": self.longest_sequence,
            "host_blocks": self.host_blocks,
            "host_tokens": self.host_tokens,
            "disk_blocks": self.disk_blocks,
            "disk_tokens": self.disk_tokens,
            "effective_tokens": self.effective_tokens,
            "effective_times": self.effective_tokens / self.gpu_tokens if self.gpu_tokens else None,
            "link_gb_s": self.link.gb_s,
            "link_origin": self.link.origin,
            "restore": [
                {
                    "tokens": tokens,
                    "bytes_per_gpu": shape.loaded_bytes(tokens),
                    "seconds": self.restore_seconds(tokens),
                }
                for tokens in RESTORED
            ],
            "notes": self.notes(),
            "kv_transfer_config": self.config.kv_transfer_config(),
        }

    def notes(self) -> list[str]:
        """What a person should know beside the numbers."""
        notes = [self._about_window(window, groups) for window, groups in self.windows.items()]
        if notes and self.longest_sequence:
            notes.append(
                f"So the GPU has room for one sequence of about {self.longest_sequence:,} tokens, "
                f"with batches of {BATCH:,}."
            )
        chunk = self.attention.promoted_chunks
        if chunk is not None:
            notes.append(f"Some layers look at chunks of {chunk} tokens; vLLM keeps all for them.")
        tp, heads = self.shape.num_gpus, self.attention.kv_heads
        if not self.attention.kv_heads_told:
            notes.append(f"No known key tells its KV heads: each of {heads} heads counts as one.")
        if tp > heads:
            kept = "the latent" if self.attention.mla else f"{heads} KV heads"
            notes.append(f"{kept[0].upper()}{kept[1:]} cannot be spread over {tp} GPUs: copies.")
        if self.gpu_tokens is not None and self.pooled_tokens <= self.gpu_tokens:
            needed = 2 * self.gpu_tokens * self.shape.bytes_per_token * tp / GIB
            notes.append(
                "The pools hold no more than the GPU does, so hardly anything will come from them; "
                f"--ram-pool-gb {needed:.3g} would hold twice as much."
            )
        if (doubt := small_disk(self.config)) is not None:
            notes.append(doubt)
        return notes

    def _about_window(self, window: int, groups: int) -> str:
        shape = self.shape
        bounded = -(-window // shape.block_tokens) * shape.block_bytes * groups * shape.num_gpus
        return (
            f"{groups} of {len(shape.reaches)} groups of layers look back {window} tokens only: of "
            f"them a sequence keeps about {bounded / (1 << 20):.4g} MiB on the GPU however long it "
            "is, and no more is loaded; the pools keep all that was stored."
        )


def make_plan(
    model: str,
    attention: Attention,
    config: KVortexConfig,
    link: Link,
    *,
    gpu_memory_gib: float | None = None,
    tensor_parallel: int = 1,
    block_tokens: int = 16,
) -> Plan:
    """Work out what fits where.

    Raises:
        ConfigError: the model cannot be spread so, or a pool holds not even one block.
    """
    shape = block_shape(attention, block_tokens, tensor_parallel)
    size, gpus, disk = shape.block_bytes, shape.num_gpus, config.disk_pool_gb
    return Plan(
        model=model,
        attention=attention,
        shape=shape,
        config=config,
        link=link,
        gpu_blocks=None if gpu_memory_gib is None else int(gpu_memory_gib * GIB) // size,
        host_blocks=slots_in_pool(config, size, gpus),
        disk_blocks=0 if disk is None else disk_slots_in_pool(disk, size, gpus),
    )


def table(plan: Plan) -> str:
    """For a person's eyes."""
    shape, attention = plan.shape, plan.attention
    gpus = f", on each of {shape.num_gpus} GPUs" if shape.num_gpus > 1 else ""
    lines = [
        f"{attention.architecture}: {len(attention.windows)} layers, {_kind(attention)}, "
        f"{attention.dtype}",
        f"a token takes {shown_bytes(shape.bytes_per_token)}{gpus}, "
        f"a block of {shape.block_tokens} tokens {shown_bytes(shape.block_bytes)}"
        + (f" in each of {len(shape.reaches)} groups of layers" if len(shape.reaches) > 1 else ""),
        "",
        f"{'':8}{'blocks':>12}{'tokens':>14}",
        *(
            f"{tier:8}{blocks:>12,}{shape.tokens(blocks):>14,}"
            for tier, blocks in (
                ("GPU", plan.gpu_blocks),
                ("host", plan.host_blocks),
                ("disk", plan.disk_blocks),
            )
            if blocks or (tier == "GPU" and blocks is not None)
        ),
        *_effect(plan),
        "",
        f"restored from host memory at {plan.link.gb_s:.3g} GB/s ({plan.link.origin}):",
        *(
            f"{tokens >> 10:>6}K tokens in {_time(plan.restore_seconds(tokens))}"
            for tokens in RESTORED
        ),
        *(("", *plan.notes()) if plan.notes() else ()),
    ]
    return "\n".join(lines)


def _effect(plan: Plan) -> list[str]:
    if plan.gpu_tokens is None:
        return ["(--gpu-memory tells what the GPU holds, for comparison)"]
    if not plan.gpu_tokens:
        each = " of each group of layers" if plan.gpu_blocks else ""
        return [f"(--gpu-memory holds no block{each}: vLLM cannot serve from it)"]
    times = plan.effective_tokens / plan.gpu_tokens
    return [f"context that can return: {plan.effective_tokens:,} tokens, {times:.3g} x the GPU's"]


def _kind(attention: Attention) -> str:
    if attention.mla:
        return f"one latent of {attention.head_elements} (MLA)"
    size = attention.head_elements // 2
    return f"{attention.kv_heads} KV heads of {size} for {attention.query_heads} heads"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
