"""Attention of draft blocks over their context: the rule, and its backends by name.

Slot queries of a block see the context before its anchor and all slots of their own block
(DeepSpec's rule). A dense mask over [n*k, t + n*k] would cost (n*k)^2, so no backend makes one.
Where blocks look is the same in every layer: a backend is an object made once for a pass, with
all that follows from the anchors, and called by each layer.

Shapes: n blocks, k slots, t context tokens (all samples flattened), a/tp query heads, g/tp
key/value heads, d head width.
"""

from typing import Protocol

import torch
from torch import Tensor

from dspark_megatron.ops.flex_block_attention import FlexBlockAttention
from dspark_megatron.ops.grouped_block_attention import GroupedBlockAttention


class BlockAttention(Protocol):
    """Attention of the blocks of one pass."""

    def __call__(
        self, query: Tensor, context_kv: tuple[Tensor, Tensor], block_kv: tuple[Tensor, Tensor]
    ) -> Tensor:
        """query [n, k, a/tp, d]; context_kv: key and value [t, g/tp, d]; block_kv: key and value
        [n, k, g/tp, d]. Returns [n, k, a/tp, d]. No collective."""


def block_attention(
    backend: str,
    context_ranges: list[tuple[int, int]],
    slots: int,
    context_length: int,
    *,
    group_size: int,
    device: torch.device,
) -> BlockAttention:
    """The backend `sdpa` or `flex` for blocks that see these half-open ranges of the context;
    `group_size` is for `sdpa`."""
    blocks = (context_ranges, slots, context_length)
    if backend == "flex":
        return FlexBlockAttention(*blocks, device=device)
    return GroupedBlockAttention(*blocks, group_size=group_size, device=device)
