"""The rules that a `config.json`, of a target or a draft, must keep before anything is made of it.

Transformers' classes check some types and no sizes, and a key that is missing or absurd would show
only in the middle of a load. A key that is absent or null is left to the family's class.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.activations import ACT2FN

from dspark_megatron.config.rules import shown
from dspark_megatron.errors import require


class Rule(NamedTuple):
    words: str
    """What a value must be."""
    holds: Callable[[Any], bool]


def _integers(low: int, high: int, *, lists: bool = False) -> Rule:
    """lists: also a list of them, one for each layer."""

    def one(value: Any) -> bool:
        return type(value) is int and low <= value <= high

    words = f"an integer from {low:,} to {high:,}{', or a list of them' if lists else ''}"
    if not lists:
        return Rule(words, one)
    return Rule(words, lambda value: all(map(one, value)) if _is_list(value) else one(value))


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_rope(value: Any, *, by_layer: bool = False) -> bool:
    """Numbers and texts by name, or such mappings by kind of layer. Lists are factors."""
    if not isinstance(value, dict):
        return False
    factor, part = value.get("factor"), value.get("partial_rotary_factor", 1.0)
    good = _is_positive(value.get("rope_theta", 1.0)) and (factor is None or _is_positive(factor))
    return (good and _is_positive(part) and part <= 1) and all(
        inner is None
        or isinstance(inner, str | bool)
        or _is_number(inner)
        or (isinstance(inner, list) and all(map(_is_number, inner)))
        or (not by_layer and _is_rope(inner, by_layer=True))
        for inner in value.values()
    )


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_dtype(value: Any) -> bool:
    found = getattr(torch, str(value).removeprefix("torch."), None)
    is_real = isinstance(found, torch.dtype) and found.is_floating_point
    return isinstance(value, str) and (is_real or value == "auto")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


_BOOL = Rule("true or false", lambda value: isinstance(value, bool))
_NORM = Rule("a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1)
_SHARE = Rule("a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1)
_THETA = Rule("a finite number > 0", _is_positive)
_ROPE = Rule(
    "an object of finite numbers and texts, its rope_theta and factor > 0 and its "
    "partial_rotary_factor in (0, 1]",
    _is_rope,
)
_MAPPING = Rule("an object", lambda value: isinstance(value, dict))
_DTYPE = Rule("the name of a floating-point type of PyTorch", _is_dtype)
_ACTIVATION = Rule("an activation of Transformers", lambda value: value in list(ACT2FN))
_WIDTH, _COUNT = _integers(1, 10**6), _integers(1, 10**5)
_WIDTHS, _COUNTS = _integers(1, 10**6, lists=True), _integers(1, 10**5, lists=True)
_TOKENS = _integers(-1, 2**31 - 1, lists=True)
"""-1 is an older way to say that there is none."""

RULES: dict[str, Rule] = {
    "model_type": Rule("a text", _is_text),
    "architectures": Rule(
        "a list of texts",
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    ),
    "auto_map": _MAPPING,
    "hidden_size": _WIDTH,
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"), _integers(1, 1000)
    ),
    "num_labels": _integers(0, 10**5),
    "num_attention_heads": _COUNTS,
    "num_key_value_heads": _COUNTS,
    "head_dim": Rule(
        "an even integer from 2 to 100,000",
        lambda value: _COUNT.holds(value) and value % 2 == 0,
    ),
    "intermediate_size": _WIDTHS,
    "moe_intermediate_size": _WIDTHS,
    "vocab_size": _integers(1, 10**7),
    "max_position_embeddings": _integers(1, 10**9),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), _WIDTH),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), _integers(0, 10**5)),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
        _integers(0, 10**5),
    ),
    "sliding_window": _integers(-1, 10**9),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), _NORM),
    **dict.fromkeys(("attention_dropout", "hidden_dropout"), _SHARE),
    "initializer_range": Rule("a finite number >= 0", lambda v: _is_number(v) and v >= 0),
    "rope_theta": _THETA,
    "rope_parameters": _ROPE,
    "rope_scaling": _ROPE,
    **dict.fromkeys(("dtype", "torch_dtype"), _DTYPE),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), _ACTIVATION),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_cache"),
        _BOOL,
    ),
    "layer_types": Rule(
        "a list of texts", lambda value: _is_list(value) and all(map(_is_text, value))
    ),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _TOKENS),
    "quantization_config": _MAPPING,
}
"""By key of `config.json`. Keys that are not here are the family's own."""
PARTS = {
    *("text_config", "language_config", "llm_config", "thinker_config"),
    *("transformer_layer_config", "dflash_config"),
}
"""Keys that hold the config of the language model in one of several parts, or part of a draft's."""


def check_schema(config: dict[str, Any], file: Path) -> None:
    """ConfigError that lists every key whose value breaks its rule."""
    problems = list(_problems(config, ""))
    require(not problems, f"{file} cannot be used: {'; '.join(problems)}")


def _problems(config: dict[str, Any], place: str) -> Iterator[str]:
    for key, rule in RULES.items():
        value = config.get(key)
        if place and key == "model_type" and value == "":
            continue  # a part that is no model, as Transformers writes MPT's attn_config
        if value is not None and not rule.holds(value):
            yield f"{place}{key} ({shown(value)}) must be {rule.words}"
    heads: Any = config.get("num_attention_heads")
    kv_heads: Any = config.get("num_key_value_heads")
    if _COUNT.holds(heads) and _COUNT.holds(kv_heads) and heads % kv_heads:
        yield (
            f"{place}num_attention_heads ({heads}) must be divisible by num_key_value_heads "
            f"({kv_heads})"
        )
    for key, part in sorted(config.items()):
        if isinstance(part, dict) and (key in PARTS or _names_part(key)):
            yield from _problems(part, f"{place}{key}.")
        elif key in PARTS and part is not None:
            yield f"{place}{key} ({shown(part)}) must be an object"


def _names_part(key: str) -> bool:
    return key.endswith("_config") and key != "quantization_config"
