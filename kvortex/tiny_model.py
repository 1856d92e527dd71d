"""A tiny random Llama with a byte-level tokenizer, made locally, for demonstrations and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

SPECIAL_TOKENS = {"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3}
VOCABULARY = 512
MAX_TOKENS = 8192


def make_tiny_model(folder: Path, seed: int = 0) -> None:
    """Write a model of 4 layers (256 wide, 4 heads, 2 KV heads of 64) and its tokenizer.

    Weights are float32 of a wide spread, so that greedy decoding meets no ties and a wrong KV
    block changes the output. One byte of text is one token.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=SPECIAL_TOKENS["<s>"],
        eos_token_id=SPECIAL_TOKENS["</s>"],
        pad_token_id=SPECIAL_TOKENS["<pad>"],
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    _save_byte_tokenizer(folder)


def _save_byte_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # one for each of the 256 bytes
    vocabulary = SPECIAL_TOKENS | {
        letter: number for number, letter in enumerate(letters, len(SPECIAL_TOKENS))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=MAX_TOKENS,
    ).save_pretrained(folder)
