"""What a Gemma-4 draft takes over from its target: the heads and RoPE of full-attention layers, and
the soft cap of logits."""

import math
from typing import Any

from dspark_megatron.config import ModelConfig
from dspark_megatron.config.attention import AttentionConfig
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.shape.rope import draft_rope

FAMILIES = ("gemma4_text", "gemma4_unified_text")
"""Text models of Gemma-4 targets."""
ACTIVATION = "gelu_pytorch_tanh"
PROPORTIONAL = "proportional"
_PROPORTIONAL_KEYS = ("rope_type", "rope_theta", "partial_rotary_factor", "factor")


def check_gemma4(model: ModelConfig, text: Any) -> None:
    """ConfigError for a text config whose layers a Gemma-4 draft is not built as, and for keys that
    no program which reads Gemma-4 drafts knows."""
    require(
        text.model_type in FAMILIES,
        f"model.architecture=gemma4 is for Gemma-4 targets, and this is a {text.model_type!r}; "
        "leave it at qwen3, which serves a target of any family",
    )
    why = {
        "experts (enable_moe_block)": text.enable_moe_block,
        "embeddings for each layer (hidden_size_per_layer_input)": text.hidden_size_per_layer_input,
        f"the activation {text.hidden_activation!r}": text.hidden_activation != ACTIVATION,
    }
    found = [name for name, hit in why.items() if hit]
    require(
        not found,
        f"model.architecture=gemma4 has no layers with what this target's have: "
        f"{', '.join(found)}; leave it at qwen3, with model.num_attention_heads and the like",
    )

    attention = AttentionConfig(biases=model.attention.biases)
    require(
        model.attention == attention and model.logit_scale == 1,
        "no program that reads a Gemma-4 draft (model.architecture=gemma4) knows windows, causal "
        "blocks, sinks or a logit scale in it; leave out model.logit_scale and all keys of "
        "model.attention but biases",
    )


def gemma4_heads(text: Any) -> tuple[int, int]:
    """Key/value heads and head width of a text config's full-attention layers."""
    if hasattr(text, "per_layer_config"):
        layer = text.per_layer_config["full_attention"]
        return layer.num_key_value_heads, layer.head_dim
    shared = text.attention_k_eq_v and text.num_global_key_value_heads
    return shared or text.num_key_value_heads, text.global_head_dim


def gemma4_rope(
    own: dict[str, Any] | None, text: Any, max_position_embeddings: int | None = None
) -> dict[str, Any]:
    """`model.rope_parameters` if given, else that of the target's full-attention layers, complete;
    beside what any draft may have also Gemma 4's proportional one. Raises ConfigError."""
    found = own
    if found is None:
        said = dict(text.rope_parameters or {})
        found = said.get("full_attention", said)
    if found.get("rope_type") != PROPORTIONAL:
        return draft_rope(own, text, max_position_embeddings)
    return proportional_rope(found, "model.rope_parameters" if own else "the target's config")


def proportional_rope(rope: dict[str, Any], where: str) -> dict[str, Any]:
    """The same, complete. ConfigError for keys it does not have and values that cannot be."""
    unknown = sorted(set(rope) - set(_PROPORTIONAL_KEYS))
    require(
        not unknown,
        f"a proportional RoPE has the keys {', '.join(_PROPORTIONAL_KEYS)}, and {where} has "
        f"{unknown}",
    )
    numbers = {"partial_rotary_factor": 1.0, **rope}
    kind = numbers.pop("rope_type")
    try:
        complete = {key: float(value) for key, value in numbers.items()}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} has a RoPE whose values are no numbers: {rope}") from error
    share = complete["partial_rotary_factor"]
    positive = all(0 < complete.get(key, 1.0) < math.inf for key in ("rope_theta", "factor"))
    require(
        "rope_theta" in complete and positive and 0 < share <= 1,
        "a proportional RoPE must have a rope_theta > 0 and a partial_rotary_factor in (0, 1], and "
        f"{where} has {rope}",
    )
    return {"rope_type": kind, **complete}


def gemma4_softcapping(text: Any) -> float | None:
    """Of base logits."""
    cap = text.final_logit_softcapping
    return None if cap is None else float(cap)
