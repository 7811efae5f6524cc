"""A target's forward pass by formula, for classes that do not run on the meta device: a bound from
the sizes of its weights and the family's plans of what is split.

Attention's scores, and what a kernel keeps inside, are not in it.
"""

import math
from collections import Counter

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dspark_megatron.planning.observing.work import Sent, Work
from dspark_megatron.planning.target.target_pass import (
    CACHE,
    GATHERED,
    LAYER,
    OUTPUTS,
    SHARDS,
    TOKENS,
    TargetPass,
)
from dspark_megatron.targets.huggingface.split import (
    TargetSplit,
    meta_target,
    split_dimension,
    style_of,
)
from dspark_megatron.targets.passes import Passes


def formula_pass(
    target_config: PretrainedConfig,
    dtype: torch.dtype,
    split: TargetSplit,
    batch: tuple[int, int],
    *,
    kept_states: int,
    last_layer: int,
    max_tokens: int | None,
) -> TargetPass:
    """batch: samples and their length. kept_states: hidden states that it gives of each token."""
    model, text = meta_target(target_config, dtype), target_config.get_text_config()
    passes, rows = Passes.of(*batch, max_tokens), math.prod(batch)
    hidden = rows * text.hidden_size * dtype.itemsize
    flops, reduced, routed, chosen = 0, 0, 0, getattr(text, "num_experts_per_tok", None) or 1
    widths: Counter[int] = Counter()
    whole: Counter[int] = Counter()
    for name, parameter in model.named_parameters():
        layer, style = layer_of(name), style_of(name, model.tp_plan)
        if layer > last_layer:
            continue
        reduced += "rowwise" in style and parameter.dim() > 1 and split.tp_size > 1
        if layer < 0 or parameter.dim() < 2:
            continue
        parts = ways(name, parameter, model, split)
        experts = len(parameter) if parameter.dim() == 3 else 1
        routed += split.ep_size > 1 and name.endswith("down_proj") and experts > 1
        rows_of_each = min(chosen, experts)
        flops += 2 * rows * parameter.numel() // (experts * parts) * rows_of_each
        widths[layer] += rows_of_each * parameter.shape[-2] // parts
        whole[layer] += parameter.numel() * dtype.itemsize // parts
    tokens = passes.sequences * passes.length
    layer_states = tokens * (4 * text.hidden_size + max(widths.values(), default=0))
    held = {LAYER: layer_states * dtype.itemsize + 2 * kept_states * hidden}
    if split.shards > 1:
        held[GATHERED] = 3 * max(whole.values())
    if passes.length < batch[1]:
        held[CACHE] = 2 * (last_layer + 1) * hidden // split.tp_size
    tp, shards, ep = split.tp_size, split.shards, split.ep_size
    gathered = passes.count * sum(whole.values()) // shards
    moved_tokens = 2 * routed * chosen * hidden // tp * (ep > tp)
    each = (
        Sent("all-reduce", OUTPUTS, tp, tp, reduced * hidden, reduced * passes.count),
        Sent("all-gather", SHARDS, shards, tp * shards, gathered, (last_layer + 1) * passes.count),
        Sent("all-to-all", TOKENS, ep, ep, moved_tokens, 2 * routed * passes.count),
    )
    moved = passes.count * sum(whole.values()) + 2 * rows * sum(widths.values()) * dtype.itemsize
    sent = tuple(one for one in each if one.size > 1 and one.handed)
    return TargetPass({"pass": held}, Work(flops, moved, sent))


def ways(name: str, parameter: nn.Parameter, model: PreTrainedModel, split: TargetSplit) -> int:
    """Into how many parts a weight is split that stay apart while it is used."""
    if split.ep_size > 1 and style_of(name, model.ep_plan):
        return split.ep_size
    return 1 if split_dimension(style_of(name, model.tp_plan), parameter) is None else split.tp_size


def formula_bytes(
    target_config: PretrainedConfig, dtype: torch.dtype, split: TargetSplit, last_layer: int
) -> int:
    """Of the weights, evenly split."""
    model = meta_target(target_config, dtype)
    kept = [(n, p) for n, p in model.named_parameters() if layer_of(n) <= last_layer]
    parts = [p.nbytes // (ways(n, p, model, split) * split.shards) for n, p in kept]
    return sum(parts)


def layer_of(name: str) -> int:
    """Number of the decoder layer that a parameter belongs to; -1 for none."""
    number = name.partition("layers.")[2].partition(".")[0]
    return int(number) if number.isdigit() else -1
