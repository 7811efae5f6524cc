"""Attention of draft blocks over their context: its backends by name.

Slot queries of a block see the context before its anchor and all slots of their own block
(DeepSpec's rule), or less where the rule of their layer says so. A dense mask over [n*k, t + n*k]
would cost (n*k)^2, so no backend makes one. A backend is an object made once for a pass and a rule,
with all that follows from the anchors, and called by each layer that has the rule.

Shapes: n blocks, k slots, t context tokens (all samples flattened), a/tp query heads, g/tp
key/value heads, d head width.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor

from dspark_megatron.config.attention import FULL, LayerAttention
from dspark_megatron.ops.attention.flex import FlexBlockAttention
from dspark_megatron.ops.attention.grouped import GroupedBlockAttention
from dspark_megatron.ops.transfer import ContextRanges

FLEX_HEAD_DIMS = range(64, 129)
"""Widths of a head for which FlexAttention was seen on a GPU to compile and to be the faster one.
With 16 PyTorch 2.11 finds no kernel; wider ones were not tried."""


class BlockAttention(Protocol):
    """Attention of the blocks of one pass in layers of one rule."""

    def __call__(
        self,
        query: Tensor,
        context_kv: tuple[Tensor, Tensor],
        block_kv: tuple[Tensor, Tensor],
        sink: Tensor | None = None,
        *,
        scale: float | None = None,
    ) -> Tensor:
        """query [n, k, a/tp, d]; context_kv: key and value [t, g/tp, d]; block_kv: key and value
        [n, k, g/tp, d]; sink [a/tp]: a logit of each head without a value; scale: of
        scores, None: 1 / sqrt(d). Returns [n, k, a/tp, d]. No collective."""


def chosen_backend(backend: str, device_type: str, head_dim: int) -> str:
    """`sdpa` or `flex`; `auto` is the faster one of those that run on a device of this type, which
    on a GPU is FlexAttention (`make gpu-check` compares them)."""
    if backend == "auto":
        return "flex" if device_type == "cuda" and head_dim in FLEX_HEAD_DIMS else "sdpa"
    return backend


def block_attention(
    backend: str,
    context_ranges: ContextRanges,
    slots: int,
    context_length: int,
    rule: LayerAttention = FULL,
    *,
    head_dim: int,
    group_size: int,
) -> BlockAttention:
    """The backend `auto`, `sdpa` or `flex` for blocks that see these ranges of the context, in
    layers of this rule; `group_size` is for `sdpa`."""
    blocks = (context_ranges, slots, context_length, rule)
    if chosen_backend(backend, context_ranges.on_device.device.type, head_dim) == "flex":
        return FlexBlockAttention(*blocks)
    return GroupedBlockAttention(*blocks, group_size=group_size)


def by_layer(
    rules: Iterable[LayerAttention], make: Callable[[LayerAttention], BlockAttention]
) -> list[BlockAttention]:
    """One for each layer; layers with the same rule share theirs."""
    rules = list(rules)
    made = {rule: make(rule) for rule in dict.fromkeys(rules)}
    return [made[rule] for rule in rules]
