"""Tiny random models of other families than the demonstration's Llama, made locally."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvortex.tiny_model import MAX_TOKENS, SPECIAL_TOKENS, VOCABULARY
from kvortex.tiny_model import make_tiny_model as llama

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["NO_FP8", "WINDOW", "llama", "mla", "window_hybrid"]

WINDOW = 96
NO_FP8 = pytest.mark.skipif(
    not torch.cuda.is_available()
    and not torch.cpu._is_avx512_supported()
    and not torch.cpu._is_amx_tile_supported(),
    reason="vLLM's fp8 KV cache needs AVX-512 or AMX on a CPU",
)
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_TOKENS,
    "bos_token_id": SPECIAL_TOKENS["<s>"],
    "eos_token_id": SPECIAL_TOKENS["</s>"],
    "pad_token_id": SPECIAL_TOKENS["<pad>"],
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}


def window_hybrid(folder: Path) -> None:
    """Layers of sliding-window and of full attention in turn: two KV cache groups."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    _save(
        folder,
        lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **COMMON,
                num_key_value_heads=2,
                head_dim=64,
                query_pre_attn_scalar=64,
                sliding_window=WINDOW,
                layer_types=["sliding_attention", "full_attention"] * 2,
            )
        ),
    )


def mla(folder: Path) -> None:
    """Multi-head latent attention: one latent for all heads."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    _save(
        folder,
        lambda: DeepseekV2ForCausalLM(
            DeepseekV2Config(
                **COMMON,
                num_key_value_heads=4,
                kv_lora_rank=512,
                q_lora_rank=None,
                qk_rope_head_dim=64,
                qk_nope_head_dim=128,
                v_head_dim=128,
                n_routed_experts=2,
                num_experts_per_tok=1,
                moe_intermediate_size=64,
                first_k_dense_replace=4,
            )
        ),
    )


def _save(folder: Path, make: Callable[[], Any]) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make().to(torch.float32).save_pretrained(folder)
