"""Block attention by PyTorch's SDPA on groups of blocks; exact on any device.

Neighbouring blocks of one sample form a group, which attends to its own prefix of the context and
its own slots: cost and memory of n * k * t.

Shapes: n blocks, m blocks of a group, k slots, t context tokens, l keys of a group, a/tp query
heads, g/tp key/value heads, d head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dspark_megatron.ops.transfer import ContextRanges

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's, which PyTorch prefers on Hopper: it makes a plan for every length of keys, and the
groups of every sample have lengths of their own."""


@dataclass(frozen=True)
class _Group:
    pieces: slice
    """The pieces of context that it sees."""
    mask: Tensor
    """[m*k, l] bool; true is visible."""


class GroupedBlockAttention:
    """A `BlockAttention`; the masks of all groups are made here.

    Prefixes overlap, and the gradient of a slice is as large as what it was cut from. So the
    context is cut once, at the ends of all prefixes, and a prefix is made of these pieces.
    """

    def __init__(
        self,
        context_ranges: ContextRanges,
        slots: int,
        context_length: int,
        *,
        group_size: int,
    ) -> None:
        groups = list(_groups(context_ranges.on_host, group_size))
        spans = [(group[0][0], max(end for _, end in group)) for group in groups]
        cuts = sorted({0, context_length}.union(*spans))
        self.piece_sizes = [after - before for before, after in pairwise(cuts)]
        self.row_counts = [len(group) * slots for group in groups]
        ends = context_ranges.on_device[:, 1]
        self.groups = [
            _Group(slice(*map(cuts.index, span)), _group_mask(part, span, slots))
            for part, span in zip(ends.split([len(g) for g in groups]), spans, strict=True)
        ]

    def __call__(
        self, query: Tensor, context_kv: tuple[Tensor, Tensor], block_kv: tuple[Tensor, Tensor]
    ) -> Tensor:
        if not self.groups:
            return query
        pieces = [context.split(self.piece_sizes) for context in context_kv]
        own = [block.flatten(0, 1).split(self.row_counts) for block in block_kv]
        queries = query.flatten(0, 1).split(self.row_counts)
        outputs = []
        with sdpa_kernel(KERNELS):
            for i, group in enumerate(self.groups):
                key, value = (
                    torch.cat([*context[group.pieces], block[i]])  # [l, g/tp, d]
                    for context, block in zip(pieces, own, strict=True)
                )
                outputs.append(_attend(queries[i], key, value, group.mask))
        return torch.cat(outputs).view_as(query)


def _groups(ranges: list[tuple[int, int]], group_size: int) -> Iterator[list[tuple[int, int]]]:
    """Runs of at most `group_size` blocks whose context starts at the same token."""
    first = 0
    for i in range(1, len(ranges) + 1):
        if i == len(ranges) or ranges[i][0] != ranges[first][0] or i - first == group_size:
            yield ranges[first:i]
            first = i


def _group_mask(ends: Tensor, span: tuple[int, int], slots: int) -> Tensor:
    """[m*k, l] bool for a group over the context of `span` and its own slots; ends [m]: where what
    each of its blocks sees of the context ends."""
    context = torch.arange(*span, device=ends.device)[None] < ends[:, None]  # [m, l - m*k]
    own = torch.eye(len(ends), dtype=torch.bool, device=ends.device)
    own = own.repeat_interleave(slots, dim=1)  # [m, m*k]
    return torch.cat([context, own], dim=1).repeat_interleave(slots, dim=0)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """[q, a/tp, d] over [l, g/tp, d] under a [q, l] mask -> [q, a/tp, d].

    Query heads that share a key head are laid side by side as queries of that head, so keys are
    never repeated in memory.
    """
    rows, heads, width = query.shape
    kv_heads = key.shape[1]
    share = heads // kv_heads
    query = (
        query.view(rows, kv_heads, share, width)
        .permute(1, 2, 0, 3)
        .reshape(1, kv_heads, share * rows, width)
    )
    out = F.scaled_dot_product_attention(
        query,
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask.repeat(share, 1),
    )
    out = out.view(kv_heads, share, rows, width).permute(2, 0, 1, 3)
    return out.reshape(rows, heads, width)
