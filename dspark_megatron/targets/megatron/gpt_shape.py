"""The target's dimensions, as Megatron-Core needs them to build a GPTModel."""

from dataclasses import dataclass, fields

from dspark_megatron.config import require


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
    moe_ffn_hidden_size: int | None = None
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
