"""Which states of a sample training can ever read, and how they are kept.

Shapes: s tokens of a sample, c of them seen as context, u whose last hidden state is a teacher,
m target layers, h hidden size.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_megatron.data.blocks import BlockRules, anchor_candidates, draft_blocks

FLOAT8 = torch.float8_e4m3fn


class KeptStates(NamedTuple):
    """States of one sample, as far as they are kept."""

    taps: Tensor
    """[c, m*h] of the first c positions."""
    last_hidden: Tensor | None
    """[u, h]; None where no teacher is kept."""
    positions: Tensor
    """[u] int64, ascending: where they stand in the sample."""


def context_size(loss_mask: Tensor, rules: BlockRules) -> int:
    """Positions that some block can see: those before the last candidate for an anchor. [s] -> c.
    At least one, as `DraftBlocks.visible_context` takes."""
    return max([1, *anchor_candidates(loss_mask, rules)[-1:].tolist()])


def target_positions(loss_mask: Tensor, block_size: int, rules: BlockRules) -> Tensor:
    """Positions whose last hidden state some supervised slot compares with. [s] -> ascending [u].
    Those of a smaller block size are among them."""
    candidates = anchor_candidates(loss_mask, rules)
    no_tokens = torch.zeros(len(loss_mask), dtype=torch.long)
    blocks = draft_blocks([no_tokens], [loss_mask], [candidates], block_size, rules)
    return blocks.position_ids()[blocks.eval_mask].unique()


def sample_key(input_ids: Tensor, loss_mask: Tensor | None = None) -> bytes:
    """16 bytes that name a sample by its content. [s], [s] bool; without a mask, by its tokens."""
    digest = hashlib.sha256(input_ids.int().numpy())
    if loss_mask is not None:
        digest.update(loss_mask.numpy())
    return digest.digest()[:16]


def to_float8(taps: Tensor, num_taps: int) -> tuple[Tensor, Tensor]:
    """[c, m*h] -> float8_e4m3fn [c, m*h] and the fp32 scale of each row of each layer, [c, m]: its
    largest number becomes the largest of the type."""
    rows = taps.float().unflatten(-1, (num_taps, -1))  # [c, m, h]
    scale = rows.abs().amax(dim=-1) / torch.finfo(FLOAT8).max
    scale.clamp_(min=torch.finfo(torch.float32).tiny)
    return (rows / scale[..., None]).to(FLOAT8).flatten(1), scale


def from_float8(taps: Tensor, scale: Tensor) -> Tensor:
    """The inverse, in bf16: the type has half its digits."""
    rows = taps.unflatten(-1, (scale.shape[-1], -1)).float() * scale[..., None]
    return rows.bfloat16().flatten(1)
