"""Block attention by PyTorch's FlexAttention: one kernel over tiles that are not empty.

Keys are the context and then the slots of all blocks. The tiles come from the anchors and the
layer's rule, at a cost of n * (t + n*k) / TILE numbers: the dense mask is never made.

Needs CUDA to train: on CPUs FlexAttention has a forward pass only, and that is where this was
compared with the dense mask. It has not been run on a GPU.

Shapes: n blocks, k slots, t context tokens, a/tp query heads, g/tp key/value heads, d head width,
i query tiles, j key tiles, w blocks that reach into a query tile.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dspark_megatron.config.attention import FULL, LayerAttention
from dspark_megatron.ops.attention.sink import scaled_by_sink
from dspark_megatron.ops.attention.visible import first_seen
from dspark_megatron.ops.transfer import ContextRanges

TILE = 128
"""Queries and keys of a tile: FlexAttention's own default."""


class FlexBlockAttention:
    """A `BlockAttention`; the block mask of all layers with its rule is made here."""

    def __init__(
        self,
        context_ranges: ContextRanges,
        slots: int,
        context_length: int,
        rule: LayerAttention = FULL,
    ) -> None:
        self.mask = None
        if context_ranges.on_host:
            self.mask = _block_mask(context_ranges.on_device, slots, context_length, rule)

    def __call__(
        self,
        query: Tensor,
        context_kv: tuple[Tensor, Tensor],
        block_kv: tuple[Tensor, Tensor],
        sink: Tensor | None = None,
        *,
        scale: float | None = None,
    ) -> Tensor:
        if self.mask is None:
            return query
        key, value = (
            torch.cat([context, block.flatten(0, 1)]).transpose(0, 1)[None]  # [1, g/tp, t + n*k, d]
            for context, block in zip(context_kv, block_kv, strict=True)
        )
        rows = query.flatten(0, 1).transpose(0, 1)[None]  # [1, a/tp, n*k, d]
        if sink is None:
            out = self.attend(rows, key, value, scale=scale)
        else:
            out = scaled_by_sink(*self.attend_with_sum(rows, key, value, scale=scale), sink)
        return out[0].transpose(0, 1).reshape(query.shape)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        """query [1, a/tp, n*k, d], key and value [1, g/tp, t + n*k, d] -> query's shape."""
        attend: Any = compiled_flex() if query.is_cuda else flex_attention
        return attend(query, key, value, block_mask=self.mask, enable_gqa=True, **options)

    def attend_with_sum(
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """And the log-sum-exp of each query's scores, [1, a/tp, n*k] fp32."""
        options |= {"return_aux": AuxRequest(lse=True)}
        out, known = self.attend(query, key, value, **options)
        return out, known.lse


@functools.cache
def compiled_flex(backend: str = "inductor") -> Callable[..., Tensor]:
    """Without compilation FlexAttention makes all scores. `dynamic`: one compilation serves
    contexts of all lengths. `fullgraph`: where it does not, and PyTorch's limit of recompilations
    is hit, that is an error, not a silent return to all scores."""
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)


def _block_mask(
    context: Tensor, slots: int, context_length: int, rule: LayerAttention
) -> BlockMask:
    """The mask of blocks that see the ranges `context` [n, 2], and their own slots, as a layer's
    rule lets them."""
    n = len(context)
    some, whole = _tiles(context, slots, context_length, rule)

    # By query [n*k]: a captured number would be a symbol in the compiled kernel.
    block = torch.arange(n, device=context.device).repeat_interleave(slots)
    slot = torch.arange(slots, device=context.device).repeat(n)
    ranges = _seen(context, block, slot, (slots, context_length), rule)
    (context_from, context_to), (own_from, own_to) = (seen.unbind(-1) for seen in ranges)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_context = (context_from[query] <= key) & (key < context_to[query])
        return in_context | ((own_from[query] <= key) & (key < own_to[query]))

    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(n * slots, context_length + n * slots),
    )


def _seen(
    context: Tensor, block: Tensor, slot: Tensor, sizes: tuple[int, int], rule: LayerAttention
) -> tuple[Tensor, Tensor]:
    """The half-open ranges [..., 2] of keys, of the context and of its own block, that a slot of a
    block sees; block and slot [...], sizes: slots of a block, tokens of context."""
    slots, context_length = sizes
    ranges = context[block]
    start = first_seen(ranges, slot, rule)
    own = context_length + slots * block
    own_end = own + slot + 1 if rule.causal else own + slots
    return torch.stack([start, ranges[..., 1]], dim=-1), torch.stack([own, own_end], dim=-1)


def _tiles(
    context: Tensor, slots: int, context_length: int, rule: LayerAttention
) -> tuple[Tensor, Tensor]:
    """[i, j] bool, twice: tiles with a visible pair, and tiles where all TILE * TILE pairs are.

    The later a slot in its block, the less of the context and the more of the block it sees. So a
    tile holds something where a block's first slot in it sees a token or its last one a slot, and
    is whole where these two see the other kind.
    """
    n, device = len(context), context.device
    key_tile = torch.arange(-(-(context_length + n * slots) // TILE), device=device)
    query_tile = torch.arange(-(-n * slots // TILE), device=device)
    first = query_tile * TILE // slots
    last = ((query_tile + 1) * TILE - 1) // slots
    width = (TILE - 2) // slots + 2
    members = torch.minimum(first[:, None] + torch.arange(width, device=device), last[:, None])
    members = members.clamp(max=n - 1)  # [i, w]
    before = query_tile[:, None] * TILE - members * slots  # queries of a block before the tile
    slot_range = before.clamp(min=0), (before + TILE - 1).clamp(max=slots - 1)
    early, late = (_seen(context, members, s, (slots, context_length), rule) for s in slot_range)
    some = _overlap(early[0], key_tile) + _overlap(late[1], key_tile)  # [i, w, j]
    some = some.amax(dim=1) > 0
    seen = _overlap(late[0], key_tile) + _overlap(early[1], key_tile)
    filled = (query_tile + 1) * TILE <= n * slots  # the last tile may have fewer queries
    return some, (seen.amin(dim=1) == TILE) & filled[:, None]


def _overlap(ranges: Tensor, tile: Tensor) -> Tensor:
    """Keys of each tile [j] in half-open ranges [..., 2] -> [..., j]."""
    start, end = ranges[..., :1], ranges[..., 1:]
    return (torch.minimum(end, (tile + 1) * TILE) - torch.maximum(start, tile * TILE)).clamp(min=0)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """[i, j] bool -> how many tiles of each row are set [1, 1, i], and which, these first
    [1, 1, i, j]."""
    which = tiles.int().argsort(dim=1, descending=True, stable=True)
    return tiles.sum(dim=1).int()[None, None], which.int()[None, None]
