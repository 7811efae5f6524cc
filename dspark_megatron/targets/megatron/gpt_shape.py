"""The target's dimensions, as Megatron-Core needs them to build a GPTModel, and those that the
Hugging Face config of a known family gives.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from transformers import PretrainedConfig

from dspark_megatron.errors import require


@dataclass(frozen=True, kw_only=True)
class GPTShape:
    """All that fixes the tensors and the mathematics of a decoder with RMSNorm, SwiGLU, RoPE and
    grouped-query attention. The names are Megatron's."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Of dense layers."""
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    """Entries that count; how a model or a checkpoint pads them depends on its layout."""
    qk_layernorm: bool
    add_qkv_bias: bool
    share_embeddings_and_output_weights: bool
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling_factor: float | None
    """Of Llama 3's scaling; None without one."""
    num_experts: int | None = None
    moe_ffn_hidden_size: int = 0
    moe_router_topk: int | None = None
    moe_router_pre_softmax: bool = False
    """Weights of the chosen experts from the softmax over all, not over the chosen ones."""
    moe_layer_freq: tuple[int, ...] | None = None
    """1 for each layer with experts, 0 for a dense one; None where all are alike."""

    def has_experts(self, layer: int) -> bool:
        """Whether a layer (0-based) does."""
        if self.moe_layer_freq is not None:
            return self.moe_layer_freq[layer] == 1
        return self.num_experts is not None

    def require_same(self, other: "GPTShape", own_name: str, other_name: str) -> None:
        """ConfigError that names every difference with both values."""
        different = [
            f"{field.name} ({getattr(self, field.name)} in {own_name}, "
            f"{getattr(other, field.name)} in {other_name})"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        require(
            not different,
            f"{own_name} and {other_name} are of different models: {', '.join(different)}; set "
            "target.path to the Hugging Face folder that the checkpoint was made from",
        )


LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Megatron-Core's scaling takes for granted."""


def gpt_shape_of(config: PretrainedConfig) -> GPTShape:
    """Raises ConfigError for a family, or a setting of one, that a GPTModel of ours is not."""
    family = config.model_type
    require(
        family in _FAMILIES,
        f"target.provider megatron knows the families {', '.join(sorted(_FAMILIES))}, and this "
        f"target is {family!r}; set target.provider=huggingface, or build its GPTModel yourself "
        "and give it to MegatronTarget",
    )
    _require_settings(config, {"hidden_act": "silu", "quantization_config": None})
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None)
    return GPTShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=kv_heads,
        kv_channels=head_dim or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        share_embeddings_and_output_weights=bool(config.tie_word_embeddings),
        layernorm_epsilon=config.rms_norm_eps,
        rotary_base=float(config.rope_parameters["rope_theta"]),
        rope_scaling_factor=_rope_scaling_factor(config),
        **_FAMILIES[family](config),
    )


def _llama(config: PretrainedConfig) -> dict[str, Any]:
    _require_settings(config, {"attention_bias": False, "mlp_bias": False})
    return {"qk_layernorm": False, "add_qkv_bias": False}


def _qwen2(config: PretrainedConfig) -> dict[str, Any]:
    _require_settings(config, {"use_sliding_window": False})
    return {"qk_layernorm": False, "add_qkv_bias": True}


def _qwen3(config: PretrainedConfig) -> dict[str, Any]:
    _require_settings(config, {"attention_bias": False, "use_sliding_window": False})
    return {"qk_layernorm": True, "add_qkv_bias": False}


def _qwen3_moe(config: PretrainedConfig) -> dict[str, Any]:
    layers, dense = config.num_hidden_layers, config.mlp_only_layers
    step = config.decoder_sparse_step
    pattern = tuple(int(i not in dense and (i + 1) % step == 0) for i in range(layers))
    return {
        **_qwen3(config),
        "num_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_pre_softmax": not config.norm_topk_prob,
        "moe_layer_freq": None if all(pattern) else pattern,
    }


_FAMILIES: dict[str, Callable[[PretrainedConfig], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}


def _rope_scaling_factor(config: PretrainedConfig) -> float | None:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    require(
        kind in ("default", "llama3"),
        f"the target's rope_type ({kind!r}) must be default or llama3 for target.provider "
        "megatron, which maps no other to Megatron-Core's; set target.provider=huggingface",
    )
    require(
        rope.get("partial_rotary_factor", 1.0) == 1.0,
        f"the target's partial_rotary_factor ({rope.get('partial_rotary_factor')}) must be 1 for "
        "target.provider megatron; set target.provider=huggingface",
    )
    if kind == "default":
        return None
    for name, fixed in LLAMA3_ROPE.items():
        require(
            rope[name] == fixed,
            f"the target's {name} ({rope[name]}) must be {fixed}: Megatron-Core has it written "
            "out, and only the factor is a parameter; set target.provider=huggingface",
        )
    return float(rope["factor"])


def _require_settings(config: PretrainedConfig, wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        found = getattr(config, name, value)
        require(
            found == value,
            f"the target's {name} ({found}) must be {value} for target.provider megatron; set "
            "target.provider=huggingface",
        )
