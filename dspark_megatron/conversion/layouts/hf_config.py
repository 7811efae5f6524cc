"""`config.json` of an export: one superset that DeepSpec, vLLM, SGLang and mlx-dspark read alike.

DSpark's own keys stand twice, at the top level and in `dflash_config`, because readers differ in
where they look; `verify.py` checks that the two agree.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from dspark_megatron.config import LossConfig, ModelConfig
from dspark_megatron.conversion.layouts.anchor_slot import block_keys, block_of_config
from dspark_megatron.conversion.layouts.attention_config import (
    PLAIN,
    Meaning,
    attention_keys,
    attention_of_config,
    lookup,
)
from dspark_megatron.conversion.layouts.names import LATENT, raise_if_any
from dspark_megatron.conversion.layouts.rope_config import rope_spellings
from dspark_megatron.errors import require
from dspark_megatron.shape import DraftShape

ARCHITECTURE = "Qwen3DSparkModel"


@dataclass(frozen=True, kw_only=True)
class DraftDescription:
    """What a draft is, in whatever layout: its shape, and the few facts of its training that some
    layout's config wants."""

    shape: DraftShape
    num_anchors: int = ModelConfig.num_anchors
    initializer_range: float = ModelConfig.initializer_range
    confidence_head_alpha: float = LossConfig.confidence_head_alpha

    @classmethod
    def of_checkpoint(cls, meta: dict[str, Any]) -> "DraftDescription":
        """From a training checkpoint's `dspark.json`."""
        shape = DraftShape.from_dict(meta["shape"])
        return cls(shape=shape, **{key: meta[key] for key in cls(shape=shape).facts()})

    def facts(self) -> dict[str, Any]:
        """All but the shape."""
        return {key: value for key, value in vars(self).items() if key != "shape"}


def hugging_face_config(
    description: DraftDescription, *, target_config: Any, dtype: torch.dtype
) -> dict[str, Any]:
    """The whole `config.json`. target_config: the target's Transformers `PretrainedConfig`, for its
    special tokens."""
    shape, text = description.shape, target_config.get_text_config()
    dtype_name = str(dtype).removeprefix("torch.")
    attention, nested_attention = attention_keys(shape)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
        **_backbone(shape, description.initializer_range),
        **attention,
        **rope_spellings(shape.rope_parameters, shape.head_dim),
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
        **block_keys(shape),
        **({} if shape.logit_scale == 1 else {"logit_scale": shape.logit_scale}),
        "num_target_layers": shape.num_target_layers,
        "num_anchors": description.num_anchors,
        **_shared_keys(shape),
        "dflash_config": {
            "projector_type": "dspark",
            "attention_mode": _attention_mode(shape),
            **_shared_keys(shape),
            **nested_attention,
            "confidence_head_alpha": description.confidence_head_alpha,
        },
    }


SHAPE_KEYS = {
    "hidden_size": ("hidden_size", int),
    "ffn_hidden_size": ("intermediate_size", int),
    "num_layers": ("num_hidden_layers", int),
    "num_attention_heads": ("num_attention_heads", int),
    "num_key_value_heads": ("num_key_value_heads", int),
    "head_dim": ("head_dim", int),
    "vocab_size": ("vocab_size", int),
    "rms_norm_eps": ("rms_norm_eps", float),
    "rope_parameters": ("rope_parameters", dict),
    "max_position_embeddings": ("max_position_embeddings", int),
    "num_target_layers": ("num_target_layers", int),
    "target_layer_ids": ("target_layer_ids", list),
    "mask_token_id": ("mask_token_id", int),
    "block_size": ("block_size", int),
    "markov_rank": ("markov_rank", int),
    "markov_head_type": ("markov_head_type", str),
    "enable_confidence_head": ("enable_confidence_head", bool),
    "confidence_head_with_markov": ("confidence_head_with_markov", bool),
}
"""Key and type in `config.json` of each field of a DraftShape."""


def description_of_config(config: dict[str, Any], meaning: Meaning = PLAIN) -> DraftDescription:
    """The draft back from such a `config.json`. Raises ConfigError that lists the keys that are
    missing or of another type. meaning: what the writer's programs take for granted."""
    missing = [key for key, _ in SHAPE_KEYS.values() if config.get(key) is None]
    require(
        not missing,
        f"config.json lacks {missing}; put them in as the draft was trained (what is the target's "
        "is taken from --target)",
    )
    raise_if_any(_type_problems(config), "config.json")
    shape = DraftShape.from_dict({field: config[key] for field, (key, _) in SHAPE_KEYS.items()})
    block_size, from_anchor = block_of_config(config)
    shape = replace(
        shape,
        block_size=block_size,
        sample_from_anchor=from_anchor,
        attention=attention_of_config(config, shape.num_layers, block_size, meaning),
        logit_scale=_logit_scale(config),
    )
    found = {**(config.get("dflash_config") or {}), **config}
    facts = DraftDescription(shape=shape).facts()
    facts |= {key: found[key] for key in facts if found.get(key) is not None}
    problems = [
        f"{key} must be a number >= 0, is {value!r}"
        for key, value in facts.items()
        if type(value) not in (int, float) or not 0 <= value < math.inf
    ]
    raise_if_any(problems, "config.json")
    return DraftDescription(shape=shape, **facts)


def _logit_scale(config: dict[str, Any]) -> float:
    places = ("logit_scale", "dflash_config.logit_scale")
    values = [value for place in places if (value := lookup(config, place)) is not None]
    for value in values:
        require(
            type(value) in (int, float) and 0 < value < math.inf and value == values[0],
            f"logit_scale must be one number > 0, is {' and '.join(map(repr, values))}",
        )
    return float(values[0]) if values else 1.0


def _type_problems(config: dict[str, Any]) -> list[str]:
    problems = [
        f"{key} must be of type {kind.__name__}, is {config[key]!r}"
        for key, kind in SHAPE_KEYS.values()
        if type(config[key]) is not kind and not (kind is float and type(config[key]) is int)
    ]
    sizes = [key for key, kind in SHAPE_KEYS.values() if kind is int and key != "mask_token_id"]
    problems += [
        f"{key} ({config[key]}) must be {'>= 0' if key == 'markov_rank' else '> 0'}"
        for key in sizes
        if type(config[key]) is int and config[key] < (key != "markov_rank")
    ]
    eps = config["rms_norm_eps"]
    if type(eps) in (int, float) and not 0 < eps < 1:
        problems.append(f"rms_norm_eps ({eps}) must be in (0, 1)")
    ids = config["target_layer_ids"]
    if isinstance(ids, list) and any(type(i) is not int for i in ids):
        problems.append(f"target_layer_ids must hold integers, is {ids}")
    head = config["markov_head_type"]
    if head not in list(LATENT):
        problems.append(f"markov_head_type must be one of {', '.join(LATENT)}, is {head!r}")
    return problems


def _backbone(shape: DraftShape, initializer_range: float) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "attention_dropout": 0.0,
        "initializer_range": initializer_range,
        "max_position_embeddings": shape.max_position_embeddings,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def _shared_keys(shape: DraftShape) -> dict[str, Any]:
    return {
        "mask_token_id": shape.mask_token_id,
        "target_layer_ids": list(shape.target_layer_ids),
        "markov_rank": shape.markov_rank,
        "markov_head_type": shape.markov_head_type,
        "enable_confidence_head": shape.enable_confidence_head,
        "confidence_head_with_markov": shape.confidence_head_with_markov,
    }


def _attention_mode(shape: DraftShape) -> str:
    return "mha" if shape.num_key_value_heads == shape.num_attention_heads else "gqa"
