"""Attention: what each layer of a model keeps of a token, read off its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvortex.core import ConfigError, printable, shown
from kvortex.planning.hf_config import HFConfig, text_of

KV_DTYPES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
}
"""Bytes of an element."""
NAMES = {"half": "float16", "float": "float32", "torch.float16": "float16"}
WRITERS = ("CausalLM", "ConditionalGeneration", "LMHeadModel", "ChatGLMModel", "ForCausalLMMTP")
"""How the classes that write text are named."""
MOST_LAYERS = 10_000
MLA_TYPES = {
    "deepseek_v2",
    "deepseek_v3",
    "kimi_k2",
    "glm4_moe_lite",
    "pangu_ultra_moe",
}
"""Models whose `kv_lora_rank` has vLLM keep one latent for all heads; others expand it."""
PATTERNS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "olmo3": 4, "exaone4": 4, "gpt_oss": 2}
"""Every so-many-th layer looks at everything, the others through a window."""
STATES = {
    "layers_block_type",
    "hybrid_override_pattern",
    "attn_layer_period",
    "state_size",
    "ssm_cfg",
    "ssm_state_size",
    "conv_L_cache",
    "linear_attn_config",
    "linear_num_value_heads",
    "mamba_d_state",
    "mamba_expand",
    "mamba_num_heads",
    "rwkv_hidden_size",
    "head_size_divisor",
}
"""Settings of models with layers that keep a state instead of keys and values."""
ATTENTION = 1
"""Of a layer in `attn_type_list`; another number is one that keeps a state."""
STATE_TYPES = ("mamba", "rwkv", "jamba", "recurrent_gemma")
OTHERWISE = {
    "compress_ratios": "compresses its cache",
    "index_topk": "keeps an index beside its cache",
    "block_configs": "has layers of different shapes",
    "per_layer_config": "has layers of different shapes",
    "attention_other_setting": "has layers of different shapes",
    "global_head_dim": "has layers of different shapes",
    "num_global_key_value_heads": "has layers of different shapes",
    "swa_num_key_value_heads": "has layers of different shapes",
    "swa_head_dim": "has layers of different shapes",
    "num_kv_shared_layers": "has layers that share a cache",
    "use_cla": "has layers that share a cache",
    "cross_attention_layers": "has layers of cross attention",
    "is_encoder_decoder": "is an encoder with a decoder",
}
"""Settings of models whose KV cache is not as simple as what is read here."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The KV cache of a model, layer by layer; all layers keep equally much of a token."""

    architecture: str
    windows: tuple[int | None, ...]
    """Of each layer: how many tokens it looks back at; None for all."""
    kv_heads: int
    """Over all GPUs; of MLA 1, which every GPU keeps a copy of."""
    head_elements: int
    """Of a token for a head, keys and values together."""
    query_heads: int
    mla: bool
    dtype: str
    """Of the elements."""
    promoted_chunks: int | None = None
    """Tokens of chunked local attention: vLLM keeps its layers like those that look at all."""
    kv_heads_told: bool = True
    """By the configuration; where not, every head counts as one."""

    def bytes_per_token(self, tensor_parallel: int) -> int:
        """Of one layer on one GPU; heads are spread, and repeated where there are too few.

        Raises:
            ConfigError: they cannot be spread over so many.
        """
        if self.query_heads % tensor_parallel:
            raise ConfigError(
                f"--tp {tensor_parallel}: the model's {self.query_heads} attention heads cannot be "
                "spread evenly; use a divisor of that"
            )
        many, few = max(self.kv_heads, tensor_parallel), min(self.kv_heads, tensor_parallel)
        if not self.mla and many % few:
            raise ConfigError(
                f"--tp {tensor_parallel}: the model's {self.kv_heads} KV heads cannot be spread or "
                "repeated evenly; use a divisor or a multiple of that"
            )
        return max(1, self.kv_heads // tensor_parallel) * self.head_elements * KV_DTYPES[self.dtype]


def attention_of(config: HFConfig, kv_dtype: str = "auto") -> Attention:
    """Read off how a model's KV cache is made.

    Args:
        config: of the whole model.
        kv_dtype: one of KV_DTYPES, or "auto" for what vLLM takes by itself.

    Raises:
        ConfigError: nothing is known of such a model, or KVortex does not serve it.
    """
    text = config.text()
    architecture = _architecture(config)
    _refuse_others(config, text)
    heads = text.required("num_attention_heads", "n_head", "n_heads")
    mla = text.has("kv_lora_rank")
    if mla and text.model_type not in MLA_TYPES:
        raise _unknown(text, "has a latent cache that vLLM may expand")
    kv_heads = 1 if mla else _kv_heads(text, heads)
    return Attention(
        architecture=architecture,
        windows=_windows(text),
        kv_heads=kv_heads or heads,
        head_elements=_latent(text) if mla else 2 * _head_size(text, heads),
        query_heads=heads,
        mla=mla,
        dtype=_dtype(config, text) if kv_dtype == "auto" else kv_dtype,
        promoted_chunks=text.number("attention_chunk_size"),
        kv_heads_told=kv_heads is not None,
    )


def _architecture(config: HFConfig) -> str:
    named = config.values.get("architectures")
    name = text_of(named[0]) if isinstance(named, list) and named else ""
    if name and not any(writer in name for writer in WRITERS):
        raise ConfigError(f"{config.name}: {name} is not known to write text with a KV cache")
    return printable(name or config.model_type or "unnamed")


def _refuse_others(config: HFConfig, text: HFConfig) -> None:
    """Raises ConfigError for a model that keeps something else than equal layers of KV."""
    kinds = text.values.get("layer_types")
    named = [text_of(kind) or shown(kind) for kind in kinds] if isinstance(kinds, list) else []
    states = set(named) - _KINDS.keys()
    keys = sorted(key for key in STATES if text.has(key))
    types = text.values.get("attn_type_list") or []
    if not isinstance(types, list) or any(kind != ATTENTION for kind in types):
        keys.append("attn_type_list")
    if states or keys or any(word in text.model_type for word in STATE_TYPES):
        what = ", ".join(sorted(states) or keys or [text.model_type])
        raise ConfigError(
            f"{config.name}: the model has layers that are not attention ({what}); KVortex stays "
            "off for it, as their state cannot be restored block by block"
        )
    for key, what in OTHERWISE.items():
        if text.has(key) or (key == "is_encoder_decoder" and config.has(key)):
            raise _unknown(text, f"{what} ({key})")
    values = text.values.get("v_head_dim")
    if values and not text.has("kv_lora_rank") and values != text.values.get("head_dim"):
        raise _unknown(text, "has values of another size than keys (v_head_dim)")


def _unknown(text: HFConfig, what: str) -> ConfigError:
    return ConfigError(
        f"{text.name}: a model of type {text.model_type!r} {what}; its size is not known to "
        "`kvortex plan`, vLLM's log tells it at start"
    )


_KINDS = {
    "full_attention": False,
    "attention": False,
    "chunked_attention": False,
    "sliding_attention": True,
}
"""Of layers in `layer_types`, and whether they look through a window."""


def _windows(text: HFConfig) -> tuple[int | None, ...]:
    layers = text.required("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if layers > MOST_LAYERS:
        raise ConfigError(f"{text.name}: {layers} layers are more than any model has")
    window = text.number("sliding_window") if _has_window(text) else None
    if window is None:
        return (None,) * layers
    return tuple(window if through else None for through in _through_window(text, layers))


def _has_window(text: HFConfig) -> bool:
    return text.has("sliding_window") and text.values.get("use_sliding_window") is not False


def _through_window(text: HFConfig, layers: int) -> list[bool]:
    """Of each layer whether it looks through the model's window; as transformers decides."""
    kinds = text.values.get("layer_types")
    if isinstance(kinds, list) and kinds:
        if len(kinds) < layers:
            raise ConfigError(f"{text.name}: layer_types names {len(kinds)} of {layers} layers")
        return [_KINDS[kind] for kind in kinds[:layers]]
    written = text_of(text.values.get("sliding_window_pattern"))
    if written and set(written) <= {"L", "G"}:  # EXAONE 4's local and global; the last is global
        last = layers - 1
        return [layer != last and written[layer % len(written)] == "L" for layer in range(layers)]
    pattern = text.number("sliding_window_pattern", "_sliding_window_pattern")
    period = pattern or PATTERNS.get(text.model_type)
    if period is not None:
        return [(layer + 1) % period != 0 for layer in range(layers)]
    if text.model_type.startswith("qwen"):  # none of them unless use_sliding_window says so
        told = text.values.get("max_window_layers", 28)
        first = told if type(told) is int else 0
        return [text.has("use_sliding_window") and layer >= first for layer in range(layers)]
    return [True] * layers


def _kv_heads(text: HFConfig, heads: int) -> int | None:
    """By the names that vLLM knows; None where it is told by none of them."""
    one = text.has("multi_query") and not text.has("new_decoder_architecture")
    if one:
        return 1
    inner: Any = text.values.get("attn_config")
    told = HFConfig(inner, text.name).number("kv_n_heads") if isinstance(inner, dict) else None
    told = told or text.number(
        "n_head_kv",
        "num_kv_heads",
        "num_key_value_heads",
        "multi_query_group_num",
        "num_attention_groups",
    )
    if told is not None and heads % told:
        raise ConfigError(
            f"{text.name}: {heads} attention heads cannot share {told} KV heads evenly"
        )
    return told


def _head_size(text: HFConfig, heads: int) -> int:
    told = text.number("head_dim") if text.has("head_dim") else text.number("kv_channels")
    if told is not None:
        return told
    hidden = text.required("hidden_size", "n_embd", "d_model")
    if hidden % heads:
        raise ConfigError(f"{text.name}: hidden_size={hidden} cannot be cut into {heads} heads")
    return hidden // heads


def _latent(text: HFConfig) -> int:
    return text.required("kv_lora_rank") + (text.number("qk_rope_head_dim") or 0)


def _dtype(config: HFConfig, text: HFConfig) -> str:
    """What vLLM keeps without being told: 8 bits where the checkpoint says so, else 16."""
    for values in (config.values, text.values):
        quantization = values.get("quantization_config") or values.get("compression_config")
        if isinstance(quantization, dict) and (found := _quantized(config, quantization)):
            return found
    for values in (config.values, text.values):
        told = values.get("dtype") or values.get("torch_dtype")
        if told is not None:
            name = text_of(told).removeprefix("torch.")
            name = NAMES.get(name, name)
            return "float16" if name == "float16" else "bfloat16"
    return "bfloat16"


def _quantized(config: HFConfig, quantization: dict[str, Any]) -> str | None:
    """How a checkpoint wants its KV cache quantized."""
    inner = quantization.get("quantization")
    places = [quantization, inner] if isinstance(inner, dict) else [quantization]
    for place in places:
        told = place.get("kv_cache_quant_algo") or place.get("kv_cache_scheme")
        if not told:
            continue
        bits = told.get("num_bits") if isinstance(told, dict) else None
        if bits == 8 or text_of(told).upper() == "FP8":
            return "fp8"
        raise ConfigError(
            f"{config.name}: the KV cache of this checkpoint is quantized as {shown(told)}, whose "
            "size is not known to `kvortex plan`; say another with --kv-dtype"
        )
    return None
