"""What the slots of a block see: the one place where the rule of a layer becomes numbers.

A block sees a half-open range of the context that ends at its anchor, so where the range ends is
where positions are measured from: with a window of W, slot j sees the last W - 1 - j tokens of it
(origin `slot`) or the last W (origin `anchor`). Of its own block it sees all slots, or those up to
itself where the layer is causal.

Shapes: n blocks, k slots.
"""

import torch
from torch import Tensor

from dspark_megatron.config.attention import LayerAttention


def first_seen(context: Tensor, slots: Tensor, rule: LayerAttention) -> Tensor:
    """The first context token that slots see. context [..., 2]: the ranges of their blocks; slots
    [...] that broadcast with these. Returns [...]; where only the range decides, without the slots'
    own dimensions."""
    start, end = context.unbind(-1)
    if rule.window is None:
        return start
    reach = rule.window if rule.window_origin == "anchor" else rule.window - 1 - slots
    return torch.maximum(start, end - reach)


def own_seen(slots: int, rule: LayerAttention, device: torch.device) -> Tensor:
    """[k, k] bool: slots of its own block that each slot sees."""
    seen = torch.ones(slots, slots, dtype=torch.bool, device=device)
    return seen.tril() if rule.causal else seen


def narrowed(ranges: list[tuple[int, int]], rule: LayerAttention) -> list[tuple[int, int]]:
    """What any slot of each block sees of its range."""
    if rule.reach is None:
        return ranges
    return [(max(start, end - rule.reach), end) for start, end in ranges]
