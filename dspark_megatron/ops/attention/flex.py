"""Block attention by PyTorch's FlexAttention: one kernel over tiles that are not empty.

Keys are the context and then the slots of all blocks. The tiles come from the anchors alone, at a
cost of n * (t + n*k) / TILE numbers: the dense mask is never made.

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
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dspark_megatron.ops.transfer import ContextRanges

TILE = 128
"""Queries and keys of a tile: FlexAttention's own default."""


class FlexBlockAttention:
    """A `BlockAttention`; the block mask of all layers is made here."""

    def __init__(
        self,
        context_ranges: ContextRanges,
        slots: int,
        context_length: int,
    ) -> None:
        self.mask = None
        if context_ranges.on_host:
            self.mask = _block_mask(context_ranges.on_device, slots, context_length)

    def __call__(
        self, query: Tensor, context_kv: tuple[Tensor, Tensor], block_kv: tuple[Tensor, Tensor]
    ) -> Tensor:
        if self.mask is None:
            return query
        key, value = (
            torch.cat([context, block.flatten(0, 1)]).transpose(0, 1)[None]  # [1, g/tp, t + n*k, d]
            for context, block in zip(context_kv, block_kv, strict=True)
        )
        rows = query.flatten(0, 1).transpose(0, 1)[None]  # [1, a/tp, n*k, d]
        return self.attend(rows, key, value)[0].transpose(0, 1).reshape(query.shape)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [1, a/tp, n*k, d], key and value [1, g/tp, t + n*k, d] -> query's shape."""
        attend: Any = compiled_flex() if query.is_cuda else flex_attention
        return attend(query, key, value, block_mask=self.mask, enable_gqa=True)


@functools.cache
def compiled_flex(backend: str = "inductor") -> Callable[..., Tensor]:
    """Without compilation FlexAttention makes all scores. `dynamic`: one compilation serves
    contexts of all lengths. `fullgraph`: where it does not, and PyTorch's limit of recompilations
    is hit, that is an error, not a silent return to all scores."""
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)


def _block_mask(context: Tensor, slots: int, context_length: int) -> BlockMask:
    """The mask of blocks that see the ranges `context` [n, 2] and their own slots."""
    n = len(context)
    own_start = context_length + slots * torch.arange(n, device=context.device)
    own = torch.stack([own_start, own_start + slots], dim=1)  # [n, 2]
    some, whole = _tiles(context, own, slots, context_length + n * slots)

    # By query [n*k]: a captured number would be a symbol in the compiled kernel.
    context_from, context_to = (ends.repeat_interleave(slots) for ends in context.unbind(1))
    own_from, own_to = (ends.repeat_interleave(slots) for ends in own.unbind(1))

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


def _tiles(context: Tensor, own: Tensor, slots: int, keys: int) -> tuple[Tensor, Tensor]:
    """[i, j] bool, twice: tiles with a visible pair, and tiles where all TILE * TILE pairs are."""
    n, device = len(context), context.device
    key_tile = torch.arange(-(-keys // TILE), device=device)
    seen = _overlap(context, key_tile) + _overlap(own, key_tile)  # [n, j]
    query_tile = torch.arange(-(-n * slots // TILE), device=device)
    first = query_tile * TILE // slots
    last = ((query_tile + 1) * TILE - 1) // slots
    width = (TILE - 2) // slots + 2
    members = torch.minimum(first[:, None] + torch.arange(width, device=device), last[:, None])
    seen = seen[members.clamp(max=n - 1)]  # [i, w, j]
    filled = (query_tile + 1) * TILE <= n * slots  # the last tile may have fewer queries
    return seen.amax(dim=1) > 0, (seen.amin(dim=1) == TILE) & filled[:, None]


def _overlap(ranges: Tensor, tile: Tensor) -> Tensor:
    """Keys of each tile [j] in half-open ranges [n, 2] -> [n, j]."""
    start, end = ranges[:, :1], ranges[:, 1:]
    return (torch.minimum(end, (tile + 1) * TILE) - torch.maximum(start, tile * TILE)).clamp(min=0)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """[i, j] bool -> how many tiles of each row are set [1, 1, i], and which, these first
    [1, 1, i, j]."""
    which = tiles.int().argsort(dim=1, descending=True, stable=True)
    return tiles.sum(dim=1).int()[None, None], which.int()[None, None]
