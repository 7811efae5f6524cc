"""Block attention by PyTorch's SDPA on groups of blocks; exact on any device.

Neighbouring blocks of one sample form a group, which attends to what they see of the context and
to its own slots: cost and memory of n * k * t, or with a window of n * k times the window.

Shapes: n blocks, m blocks of a group, k slots, t context tokens, l keys of a group, a/tp query
heads, g/tp key/value heads, d head width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dspark_megatron.config.attention import FULL, LayerAttention
from dspark_megatron.ops.attention.sink import sink_kv, widened, with_sink
from dspark_megatron.ops.attention.visible import first_seen, narrowed, own_seen
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

    What groups see overlaps, and the gradient of a slice is as large as what it was cut from. So
    the context is cut once, where any group's part starts or ends, and each part is made of these
    pieces.
    """

    def __init__(
        self,
        context_ranges: ContextRanges,
        slots: int,
        context_length: int,
        rule: LayerAttention = FULL,
        *,
        group_size: int,
    ) -> None:
        groups = list(_groups(narrowed(context_ranges.on_host, rule), group_size))
        spans = [_span(group, context_length) for group in groups]
        cuts = sorted({0, context_length}.union(*spans))
        self.piece_sizes = [after - before for before, after in pairwise(cuts)]
        self.row_counts = [len(group) * slots for group in groups]
        ranges = context_ranges.on_device
        slot = torch.arange(slots, device=ranges.device)
        starts = first_seen(ranges[:, None], slot, rule)  # [n, k], or [n, 1] where slots agree
        own = own_seen(slots, rule, ranges.device)
        sizes = [len(group) for group in groups]
        parts = zip(starts.split(sizes), ranges[:, 1:].split(sizes), spans, strict=True)
        self.groups = [
            _Group(slice(*map(cuts.index, span)), _group_mask(start, end, span, own))
            for start, end, span in parts
        ]

    def __call__(
        self,
        query: Tensor,
        context_kv: tuple[Tensor, Tensor],
        block_kv: tuple[Tensor, Tensor],
        sink: Tensor | None = None,
        *,
        scale: float | None = None,
    ) -> Tensor:
        if not self.groups:
            return query
        width = query.shape[-1]
        scale = scale or 1 / math.sqrt(width)
        sinks: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = (), ()
        if sink is not None:
            query, context_kv = with_sink(query, sink), widened(context_kv)
            block_kv = widened(block_kv)
            sinks = sink_kv(block_kv, scale)
        pieces = [context.split(self.piece_sizes) for context in context_kv]
        own = [block.flatten(0, 1).split(self.row_counts) for block in block_kv]
        queries = query.flatten(0, 1).split(self.row_counts)
        outputs = []
        with sdpa_kernel(KERNELS):
            for i, group in enumerate(self.groups):
                key, value = (
                    torch.cat([*context[group.pieces], block[i], *last])  # [l, g/tp, d]
                    for context, block, last in zip(pieces, own, sinks, strict=True)
                )
                mask = group.mask if sink is None else F.pad(group.mask, (0, 1), value=True)
                outputs.append(_attend(queries[i], key, value, mask, scale))
        return torch.cat(outputs).view_as(query)[..., :width]


def _groups(ranges: list[tuple[int, int]], group_size: int) -> Iterator[list[tuple[int, int]]]:
    """Runs of at most `group_size` blocks that share context. Those with a window are apart where
    one more would have to go through more than twice what it sees."""
    first = 0
    for i in range(1, len(ranges) + 1):
        if i < len(ranges) and i - first < group_size:
            (start, end), begin, seen = ranges[i], ranges[first][0], ranges[i - 1][1]
            shares = start < seen or start == begin
            if shares and end - begin <= 2 * (end - start):
                continue
        yield ranges[first:i]
        first = i


def _span(group: list[tuple[int, int]], context_length: int) -> tuple[int, int]:
    """The context that a group goes through: what its blocks see, or, where that is nothing, one
    token that its mask hides: so each weight has a gradient, which overlapped reductions need."""
    first = max(0, min(group[0][0], context_length - 1))
    return first, min(context_length, max(first + 1, *(end for _, end in group)))


def _group_mask(starts: Tensor, ends: Tensor, span: tuple[int, int], own: Tensor) -> Tensor:
    """[m*k, l] bool for a group over the context of `span` and its own slots. starts [m, k] or
    [m, 1], ends [m, 1]: what its slots see of the context; own [k, k]: of their block."""
    m, k = len(starts), len(own)
    token = torch.arange(*span, device=own.device)
    context = (starts[..., None] <= token) & (token < ends[..., None])  # [m, k or 1, l - m*k]
    same = torch.eye(m, dtype=torch.bool, device=own.device)
    blocks = same[:, None, :, None] & own[None, :, None, :]  # [m, k, m, k]
    return torch.cat([context.expand(m, k, -1).flatten(0, 1), blocks.reshape(m * k, m * k)], dim=1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
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
        scale=scale,
    )
    out = out.view(kv_heads, share, rows, width).permute(2, 0, 1, 3)
    return out.reshape(rows, heads, width)
