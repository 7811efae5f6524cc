"""`config.json` of a Gemma-4 draft, as DeepSpec writes and vLLM reads it, and the draft of one.

It is a Gemma-4 text config of the draft's layers with DSpark's keys at the top level. There is no
`dflash_config`: such a config always has a window, and beside that key mlx-dspark would use it.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from dspark_megatron.config.attention import AttentionConfig
from dspark_megatron.conversion.layouts.anchor_slot import block_keys
from dspark_megatron.conversion.layouts.hf_config import (
    DraftDescription,
    description_of_config,
)
from dspark_megatron.conversion.layouts.names import raise_if_any
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.shape import DraftShape
from dspark_megatron.shape.attention import DraftAttention
from dspark_megatron.shape.gemma4 import ACTIVATION, FAMILIES, gemma4_heads, gemma4_rope

Config = dict[str, Any]

ARCHITECTURE = "Gemma4DSparkModel"
FULL = "full_attention"
NOT_SAID = ("speculators", "modelopt", "specforge")
"""Layouts of programs that have Qwen3-style drafts only."""
_SWITCHES = {
    "a quantized draft (quantization_config)": "quantization_config",
    "experts (enable_moe_block)": "enable_moe_block",
    "embeddings for each layer (hidden_size_per_layer_input)": "hidden_size_per_layer_input",
    "an MLP of double width (use_double_wide_mlp)": "use_double_wide_mlp",
    "keys and values of other layers (num_kv_shared_layers)": "num_kv_shared_layers",
    "causal attention within a block (is_causal)": "is_causal",
    "a soft cap of scores (attn_logit_softcapping)": "attn_logit_softcapping",
}
_DSPARK = """
    target_layer_ids mask_token_id num_anchors enable_confidence_head confidence_head_with_markov
    confidence_head_alpha markov_rank markov_head_type block_size num_target_layers
    sample_from_anchor num_speculative_tokens dspark_target_layer_ids
""".split()
_TEXT = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads num_global_key_value_heads head_dim global_head_dim per_layer_config
    attention_k_eq_v attention_bias rms_norm_eps rope_parameters max_position_embeddings
    layer_types hidden_activation final_logit_softcapping
""".split()
_HARMLESS = """
    architectures model_type target_model_type target_text_model_type transformers_version dtype
    torch_dtype initializer_range use_cache tie_word_embeddings attention_dropout sliding_window
    bos_token_id eos_token_id pad_token_id vocab_size_per_layer_input use_bidirectional_attention
    num_experts top_k_experts moe_intermediate_size _name_or_path chunk_size_feed_forward
    is_encoder_decoder id2label label2id problem_type output_attentions output_hidden_states
    return_dict _attn_implementation attn_implementation
""".split()
"""Of training, of other parts of the model, or of what the keys above leave without a use."""


def is_gemma4(config: Config) -> bool:
    """Whether a `config.json` is that of a Gemma-4 draft."""
    return (config.get("architectures") or [None])[0] == ARCHITECTURE


def gemma4_config(
    description: DraftDescription, *, target_config: Any, dtype: torch.dtype
) -> Config:
    """The whole `config.json`. target_config: the target's Transformers `PretrainedConfig`."""
    shape, text = description.shape, target_config.get_text_config()
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": FAMILIES[0],
        "target_model_type": target_config.model_type,
        "target_text_model_type": text.model_type,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
        **_backbone(shape),
        "initializer_range": description.initializer_range,
        # Of the target's other layers; the draft has none of them.
        "sliding_window": getattr(text, "sliding_window", None) or 512,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
        **block_keys(shape),
        "num_target_layers": shape.num_target_layers,
        "num_anchors": description.num_anchors,
        "mask_token_id": shape.mask_token_id,
        "target_layer_ids": list(shape.target_layer_ids),
        "markov_rank": shape.markov_rank,
        "markov_head_type": shape.markov_head_type,
        "enable_confidence_head": shape.enable_confidence_head,
        "confidence_head_with_markov": shape.confidence_head_with_markov,
        "confidence_head_alpha": description.confidence_head_alpha,
    }


def _backbone(shape: DraftShape) -> Config:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        # Heads of sliding and of full layers. Readers differ in the pair that they take.
        "num_key_value_heads": shape.num_key_value_heads,
        "num_global_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "global_head_dim": shape.head_dim,
        "attention_k_eq_v": shape.shared_key_value,
        "attention_bias": shape.attention.biases,
        "attention_dropout": 0.0,
        "hidden_activation": ACTIVATION,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": {FULL: dict(shape.rope_parameters)},
        "max_position_embeddings": shape.max_position_embeddings,
        "layer_types": [FULL] * shape.num_layers,
        "final_logit_softcapping": shape.logit_softcapping,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "num_kv_shared_layers": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def gemma4_description(config: Config) -> DraftDescription:
    """The draft back from such a `config.json`; strict: ConfigError for keys that are missing, of
    another type or not known, and for what our draft does not have."""
    raise_if_any(list(_problems(config)), "config.json of a Gemma-4 draft")
    text, kv_heads, head_dim = _text_config(config)
    rope = config.get("rope_parameters")
    canonical = {
        **config,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rope_parameters": gemma4_rope(None, text) if rope else None,
    }
    canonical.setdefault("markov_head_type", "vanilla")  # as without a Markov head
    canonical.setdefault("confidence_head_with_markov", False)
    found = description_of_config(canonical)
    cap = config.get("final_logit_softcapping")
    attention = AttentionConfig(biases=bool(config.get("attention_bias")))
    shape = replace(
        found.shape,
        architecture="gemma4",
        shared_key_value=bool(config.get("attention_k_eq_v")),
        attention=DraftAttention.of(attention, found.shape.num_layers),
        logit_softcapping=None if cap is None else float(cap),
    )
    return replace(found, shape=shape)


def _text_config(config: Config) -> tuple[Any, int, int]:
    """As Transformers reads it, with the key/value heads and head width of its layers."""
    from transformers import Gemma4TextConfig

    try:
        text = Gemma4TextConfig(
            **{key: config[key] for key in _TEXT if config.get(key) is not None}
        )
        return text, *gemma4_heads(text)
    except Exception as error:  # its class checks each key in its own way
        said = " ".join(str(error).split())
        raise ConfigError(f"Transformers cannot read config.json of this draft: {said}") from error


def _problems(config: Config) -> Iterator[str]:
    known = {*_DSPARK, *_TEXT, *_HARMLESS, *_SWITCHES.values()}
    if unknown := sorted(set(config) - known):
        yield f"{unknown}: not known, and so not to be left out"
    if config.get("model_type") not in (None, *FAMILIES):
        yield f"model_type {config['model_type']!r} must be one of {', '.join(FAMILIES)}"
    for what, key in _SWITCHES.items():
        if config.get(key):
            yield f"{what}: not supported, and not to be left out"
    if (kind := config.get("hidden_activation")) != ACTIVATION:
        yield f"hidden_activation must be {ACTIVATION!r}, is {kind!r}"
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if not isinstance(kinds, list) or kinds != [FULL] * len(kinds) or len(kinds) != layers:
        yield f"layer_types must be {FULL} for each of the {layers} layers, is {kinds}"
    cap = config.get("final_logit_softcapping")
    if cap is not None and not (type(cap) in (int, float) and 0 < cap < float("inf")):
        yield f"final_logit_softcapping must be null or a number > 0, is {cap!r}"
    for key in ("attention_k_eq_v", "attention_bias", "sample_from_anchor"):
        if type(config.get(key, False)) is not bool:
            yield f"{key} must be true or false, is {config[key]!r}"
    ids, same = config.get("target_layer_ids"), config.get("dspark_target_layer_ids")
    if same is not None and same != ids:
        yield f"dspark_target_layer_ids {same} and target_layer_ids {ids} must be the same"


def check_layout_of_gemma4(layout: str) -> None:
    """ConfigError for a layout whose programs have no Gemma-4 drafts."""
    require(
        layout not in NOT_SAID,
        f"a Gemma-4 draft (model.architecture=gemma4) cannot have layout {layout}: what reads it "
        "has Qwen3-style layers only; use --layout hf, which DeepSpec and vLLM load",
    )
