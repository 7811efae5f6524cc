"""What a forward pass of the frozen target takes beside its weights, and what it sends, by formula.

Tensors are those that Transformers' modules have alive at once, where a test counts them; what a
kernel takes inside (and `eager` attention, or a mask) is not in it. Weights are looked up in
Transformers' own plans of the family, on the meta device.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from dspark_megatron.shape import layer_values
from dspark_megatron.targets.huggingface.split import (
    TargetSplit,
    meta_target,
    split_dimension,
    style_of,
)
from dspark_megatron.targets.passes import Passes

FP32 = 4


@dataclass(frozen=True)
class TargetWork:
    """Of one rank and one micro-batch, in bytes."""

    layer: int
    """Intermediate states of one pass in the layer that needs most."""
    last_states: int
    """Of one pass; they come when its layers are through."""
    cache: int
    """Keys and values of a sample that goes through in pieces; 0 if none does."""
    gathered_layers: int
    """A layer made whole to run, thrice: its weights, as they arrived, and the next layer's as they
    arrive (on a GPU they lie on another stream, whose memory is its own); 0 if not sharded."""
    received_weights: int
    """Of other ranks' shards, in one forward pass."""
    all_reduced: int
    """Outputs of split linears, experts and embeddings; none on one rank."""
    exchanged: int
    """Routed tokens to the ranks of their experts and back, and whole again in the split group."""


NO_WORK = TargetWork(0, 0, 0, 0, 0, 0, 0)
"""Of a target that is not run."""


def target_work(
    target_config: PretrainedConfig,
    dtype: torch.dtype,
    split: TargetSplit,
    batch: tuple[int, int],
    *,
    last_layer: int,
    max_tokens: int | None = None,
) -> TargetWork:
    """batch: samples and their length. last_layer: the highest decoder layer that is kept.
    max_tokens: of one forward pass; None: the whole batch."""
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
    rows = math.prod(batch) * text.hidden_size * dtype.itemsize
    shared_batch = split.ep_size == split.tp_size  # then outputs are summed, and no token moves
    reduced += routed if shared_batch else 0
    exchanged = 0 if shared_batch else routed * _exchanged(text, rows, split)
    reduced = reduced * rows if split.tp_size > 1 else 0
    attention_parts = split.tp_size if _splits_attention(model.tp_plan) else 1
    passes, cache = Passes.of(*batch, max_tokens), 0
    tokens = passes.sequences * passes.length
    states = tokens * _token_states(text, split, attention_parts, dtype)
    if passes.length < batch[1]:
        cache = (last_layer + 1) * batch[1] * _cached(text, attention_parts)
        # Queries of a piece need a mask, and with it keys and values of every query head.
        states += 2 * batch[1] * _query_width(text) // attention_parts
    e = dtype.itemsize
    last_states = e * tokens * text.hidden_size
    sent = received, reduced, exchanged
    return TargetWork(e * states, last_states, e * cache, 3 * max(whole), *sent)


def _splits_attention(tp_plan: dict[str, str] | None) -> bool:
    return any("self_attn" in name for name in tp_plan or {})


def _exchanged(text: Any, rows: int, split: TargetSplit) -> int:
    """Of one layer with experts: each rank of a tensor-parallel group sends its part of the tokens,
    once for each of their experts, and gets as much back; then the parts are gathered."""
    others = (split.ep_size - 1) / split.ep_size
    gathered = rows * (split.tp_size - 1) // split.tp_size
    return int(2 * others * _experts_of_a_token(text) * rows / split.tp_size) + gathered


def _token_states(text: Any, split: TargetSplit, attention_parts: int, dtype: torch.dtype) -> int:
    """Numbers for each token, at the highest of a layer's moments. The embeddings, the layer's
    input and the sum after its attention stay throughout; beside them the normed input."""
    h, mlp = text.hidden_size, 3 * (getattr(text, "intermediate_size", None) or 0)
    return max(
        3 * h + 2 * FP32 * h // dtype.itemsize,  # a norm in fp32
        3 * h + _attention_width(text) // attention_parts,
        4 * h + mlp // split.tp_size,  # gate, up and their product
        4 * h + _expert_width(text, split, dtype),
    )


def _attention_width(text: Any) -> int:
    """While queries or keys are rotated: queries, keys and values, and three numbers for each one
    that is being rotated. Latent attention at its end: queries before, with and after rotation,
    keys and values before and after they are put together, the output before and after it is put
    in order."""
    heads = _heads(text)
    if _is_latent(text):
        width = text.qk_nope_head_dim + text.qk_rope_head_dim
        return heads * (4 * width + 3 * text.v_head_dim)
    kv_heads = _kv_heads(text)
    return _head_dim(text) * max(4 * heads + 2 * kv_heads, 2 * heads + 5 * kv_heads)


def _query_width(text: Any) -> int:
    width = text.qk_nope_head_dim + text.qk_rope_head_dim if _is_latent(text) else _head_dim(text)
    return _heads(text) * width


def _cached(text: Any, attention_parts: int) -> int:
    """Numbers of a token in one layer's cache; latents are whole on every rank."""
    if _is_latent(text):
        return text.kv_lora_rank + text.qk_rope_head_dim
    return 2 * _kv_heads(text) * _head_dim(text) // attention_parts


def _is_latent(text: Any) -> bool:
    return getattr(text, "kv_lora_rank", None) is not None


def _heads(text: Any) -> int:
    """The most of any layer; 0 for a family without attention."""
    return max(layer_values(text, "num_attention_heads"), default=0)


def _kv_heads(text: Any) -> int:
    return max(layer_values(text, "num_key_value_heads"), default=_heads(text))


def _head_dim(text: Any) -> int:
    own = layer_values(text, "head_dim")
    return max(own) if own else text.hidden_size // max(1, _heads(text))


def _expert_width(text: Any, split: TargetSplit, dtype: torch.dtype) -> int:
    """A token's rows for its experts: gathered, with gate, up, an activation and the product; later
    gathered, out of the experts, weighted and in order again. The latter two are fp32 where the
    router's weights are (Mixtral, DeepSeek), and are counted so. Experts of other ranks have rows
    too, unless tokens travel: then a rank has as many as it sends, and those that arrived beside.
    """
    chosen, h = _experts_of_a_token(text), text.hidden_size
    width = getattr(text, "moe_intermediate_size", None)
    width = width or getattr(text, "intermediate_size", None) or 0
    weighted = 2 * h + 2 * FP32 * h // dtype.itemsize
    if split.ep_size > split.tp_size:
        return chosen * (h + max(h + 4 * width, weighted)) // split.tp_size
    parts = split.tp_size if split.ep_size == 1 else 1
    return chosen * max(h + 4 * width // parts, weighted)


def _experts_of_a_token(text: Any) -> int:
    return getattr(text, "num_experts_per_tok", None) or 0


def _layer_of(name: str) -> int:
    """Number of the decoder layer that a parameter belongs to; -1 for none."""
    _, _, rest = name.partition("layers.")
    number = rest.partition(".")[0]
    return int(number) if number.isdigit() else -1
