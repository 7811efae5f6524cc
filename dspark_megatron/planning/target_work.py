"""What a forward pass of the frozen target takes beside its weights, and what it sends, by formula.

Nothing here is measured: kernels of a family may need more. Weights are looked up in Transformers'
own plans of the family, on the meta device.

Shapes: T tokens of a micro-batch, h hidden, a and g query and key/value heads, d head width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from dspark_megatron.targets.split import TargetSplit, meta_target, split_dimension, style_of


@dataclass(frozen=True)
class TargetWork:
    """Of one rank and one micro-batch, in bytes."""

    layer: int
    """Intermediate states of the layer that needs most."""
    gathered_layers: int
    """Weights of a layer made whole to run and of the next one, fetched ahead; 0 if not sharded."""
    received_weights: int
    """Of other ranks' shards, in one forward pass."""
    all_reduced: int
    """Outputs of split linears, experts and embeddings; none on one rank."""
    exchanged: int
    """Routed tokens to the ranks of their experts and back, and whole again in the split group."""


NO_WORK = TargetWork(0, 0, 0, 0, 0)
"""Of a target that is not run."""


def target_work(
    target_config: PretrainedConfig,
    dtype: torch.dtype,
    split: TargetSplit,
    tokens: int,
    *,
    last_layer: int,
) -> TargetWork:
    """last_layer: the highest decoder layer that is kept."""
    model = meta_target(target_config, dtype)
    text = target_config.get_text_config()
    whole, received, reduced, routed = [0] * (last_layer + 1), 0, 0, 0
    for name, parameter in model.named_parameters():
        layer, style, shards = _layer_of(name), style_of(name, model.tp_plan), split.shards
        if not 0 <= layer <= last_layer:
            reduced += style.startswith("embedding_rowwise")
            continue
        dimension = split_dimension(style, parameter)
        parts = 1 if dimension is None else split.tp_size
        if split.ep_size > 1 and style_of(name, model.ep_plan):
            parts, shards = split.ep_size, split.expert_shards
            routed += name.endswith("down_proj")
        elif parts > 1 and "rowwise" in style and parameter.dim() > 1:
            reduced += 1
        size = math.ceil(parameter.numel() / parts) * dtype.itemsize
        whole[layer] += size if shards > 1 else 0
        received += size * (shards - 1) // shards
    rows = tokens * text.hidden_size * dtype.itemsize
    shared_batch = split.ep_size == split.tp_size  # then outputs are summed, and no token moves
    reduced += routed if shared_batch else 0
    exchanged = 0 if shared_batch else routed * _exchanged(text, rows, split)
    states = _layer_states(text, model.tp_plan, split, tokens) * dtype.itemsize
    reduced = reduced * rows if split.tp_size > 1 else 0
    return TargetWork(states, 2 * max(whole), received, reduced, exchanged)


def _exchanged(text: Any, rows: int, split: TargetSplit) -> int:
    """Of one layer with experts: each rank of a tensor-parallel group sends its part of the tokens,
    once for each of their experts, and gets as much back; then the parts are gathered."""
    others = (split.ep_size - 1) / split.ep_size
    gathered = rows * (split.tp_size - 1) // split.tp_size
    return int(2 * others * _experts_of_a_token(text) * rows / split.tp_size) + gathered


def _layer_states(text: Any, tp_plan: dict[str, str], split: TargetSplit, tokens: int) -> int:
    """Numbers: the residual and the normed states, and what attention or the MLP needs at once."""
    attention_split = any("self_attn" in name for name in tp_plan or {})
    attention = _attention_width(text) // (split.tp_size if attention_split else 1)
    mlp = 3 * (getattr(text, "intermediate_size", None) or 0) // split.tp_size
    return tokens * (2 * text.hidden_size + max(attention, mlp, _expert_width(text, split)))


def _attention_width(text: Any) -> int:
    """Queries and keys before and after their rotation, values, the output. Latent attention has
    keys and values of every query head."""
    heads = text.num_attention_heads
    if getattr(text, "kv_lora_rank", None) is not None:
        width = text.qk_nope_head_dim + text.qk_rope_head_dim
        return heads * (4 * width + 2 * text.v_head_dim)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return head_dim * (3 * heads + 3 * kv_heads)


def _expert_width(text: Any, split: TargetSplit) -> int:
    """A token's row for each of its experts, in and out, and gate, up and their product between."""
    chosen = _experts_of_a_token(text)
    width = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", 0)
    if split.ep_size > split.tp_size:  # a rank runs as many routed tokens as it sends
        return chosen * (2 * text.hidden_size + 3 * width) // split.tp_size
    return chosen * (2 * text.hidden_size + 3 * width // split.tp_size)


def _experts_of_a_token(text: Any) -> int:
    return getattr(text, "num_experts_per_tok", None) or 0


def _layer_of(name: str) -> int:
    """Number of the decoder layer that a parameter belongs to; -1 for none."""
    _, _, rest = name.partition("layers.")
    number = rest.partition(".")[0]
    return int(number) if number.isdigit() else -1
