"""Exact attention of draft blocks over their context, without the dense mask.

Slot queries of a block see the context before its anchor and all slots of their own block
(DeepSpec's rule). A dense mask over [n*k, s + n*k] would cost (n*k)^2; here neighbouring blocks of
one sample form groups, and a group attends to its own prefix of the context and its own slots: cost
and memory of n * k * s.

Shapes: n blocks, k slots, t context tokens (all samples flattened), a/tp query heads, g/tp
key/value heads, d head width.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def block_attention(
    query: Tensor,
    context_kv: tuple[Tensor, Tensor],
    block_kv: tuple[Tensor, Tensor],
    context_ranges: list[tuple[int, int]],
    group_size: int,
) -> Tensor:
    """query [n, k, a/tp, d]; context_kv: key and value [t, g/tp, d]; block_kv: key and value
    [n, k, g/tp, d]; context_ranges: for each block the half-open range of context it sees.
    Returns [n, k, a/tp, d]. No collective."""
    slots = query.shape[1]
    outputs = []
    for first, last in _groups(context_ranges, group_size):
        ranges = context_ranges[first:last]
        start, end = ranges[0][0], max(stop for _, stop in ranges)
        keys, values = (
            torch.cat([context[start:end], block[first:last].flatten(0, 1)])  # [l, g/tp, d]
            for context, block in zip(context_kv, block_kv, strict=True)
        )
        mask = _group_mask(ranges, start, end, slots, query.device)
        outputs.append(_attend(query[first:last].flatten(0, 1), keys, values, mask))
    return torch.cat(outputs).view_as(query)


def _groups(ranges: list[tuple[int, int]], group_size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `group_size` blocks whose context starts at the same token."""
    first = 0
    for i in range(1, len(ranges) + 1):
        if i == len(ranges) or ranges[i][0] != ranges[first][0] or i - first == group_size:
            yield first, i
            first = i


def _group_mask(
    ranges: list[tuple[int, int]], start: int, end: int, slots: int, device: torch.device
) -> Tensor:
    """[m*k, (end - start) + m*k] bool for the m blocks of a group; true is visible."""
    stops = torch.tensor([stop for _, stop in ranges], device=device)
    context = torch.arange(start, end, device=device)[None] < stops[:, None]  # [m, c]
    own = torch.eye(len(ranges), dtype=torch.bool, device=device)
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
