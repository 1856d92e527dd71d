"""A real vLLM with LoRA adapters, one of which is trained again between two lives of the server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engines import counters, prompts, running, whole_blocks
from test_disk_serving import settled, with_disk

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

LENGTHS = [900]
LAYERS, WIDTH, KV_WIDTH, RANK = 4, 256, 128, 8
"""Of the tiny model, and of the adapters."""


def make_adapter(folder: Path, seed: int) -> None:
    """As PEFT writes them."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 8 * RANK}
    settings |= {"target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    draw, weights = torch.Generator().manual_seed(seed), {}
    for layer in range(LAYERS):
        for name, rows in (("q_proj", WIDTH), ("v_proj", KV_WIDTH)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (RANK, WIDTH)), ("lora_B", (rows, RANK))):
                weights[f"{place}.{part}.weight"] = torch.randn(shape, generator=draw) / 8
    save_file(weights, folder / "adapter_model.safetensors")


def answered(llm: Any, folder: Path, number: int) -> tuple[list[int], int]:
    """Output and cached tokens of the prompt with an adapter."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    greedy = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, detokenize=False)
    lora = LoRARequest(folder.name, number, str(folder))
    (out,) = llm.generate(prompts(LENGTHS), greedy, use_tqdm=False, lora_request=lora)
    return list(out.outputs[0].token_ids), out.num_cached_tokens


def test_an_adapter_that_was_trained_again_does_not_get_its_old_blocks(
    tiny_model: str, tmp_path: Path
) -> None:
    lora = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}
    disk = with_disk(tmp_path / "disk") | lora
    kept, trained = tmp_path / "kept", tmp_path / "trained"
    make_adapter(kept, 1)
    make_adapter(trained, 2)
    with running(tiny_model, None, **disk) as llm:
        right = answered(llm, kept, 1)[0]
        before = answered(llm, trained, 2)[0]
        assert settled(llm)["disk_written_blocks"] == 2 * (LENGTHS[0] // 32)
    make_adapter(trained, 3)
    with running(tiny_model, None, **lora) as llm:
        after = answered(llm, trained, 2)[0]
    assert len({tuple(right), tuple(before), tuple(after)}) == 3
    with running(tiny_model, None, **disk) as llm:
        assert answered(llm, trained, 2) == (after, 0)
        assert answered(llm, kept, 1) == (right, *whole_blocks(LENGTHS))
        assert counters(llm)["disk_hit_tokens"] == whole_blocks(LENGTHS)[0]
