"""Anchors of a sample and the blocks they start (training semantics of DeepSpec, section 2b).

A block belongs to one anchor: slot k holds position `anchor + k` and predicts token
`anchor + k + 1`. Everything here is made on the CPU, where the data is, from the data and a seed
alone, so it is the same on every tensor-parallel rank and for every layout.

Shapes: b samples, s tokens, n blocks of the whole micro-batch (only real ones: no filler), k slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_megatron.seeds import derived_seed


@dataclass(frozen=True)
class DraftBlocks:
    """The blocks of a micro-batch of right-padded samples; all tensors on the CPU."""

    sample_index: Tensor
    """[n] row of the micro-batch that the block belongs to."""
    anchor_positions: Tensor
    """[n] position of the anchor in its sample; ascending within a sample."""
    labels: Tensor
    """[n, k] ground-truth next tokens; 0 where `eval_mask` is false for want of a token."""
    prev_token_ids: Tensor
    """[n, k] token before each label; slot 0 sees the anchor."""
    eval_mask: Tensor
    """[n, k] bool: the contiguous supervised prefix of the block."""
    candidates: int
    """Anchors that could have been sampled in the micro-batch."""

    @property
    def num_blocks(self) -> int:
        return self.labels.shape[0]

    def position_ids(self) -> Tensor:
        """[n, k]: slot k stands at `anchor + k`."""
        return self.anchor_positions[:, None] + torch.arange(self.labels.shape[1])

    def context_ranges(self, seq_length: int) -> list[tuple[int, int]]:
        """Half-open ranges `[start, end)` of visible context, as indices into the flattened
        [b * s] context: strictly before the anchor, inside its sample."""
        start = self.sample_index * seq_length
        end = start + self.anchor_positions
        return list(zip(start.tolist(), end.tolist(), strict=True))

    def teacher_index(self, seq_length: int) -> Tensor:
        """[n, k] indices into the flattened [b * s] sequence of the target state that predicts
        each label (position `anchor + k`); valid where `eval_mask` is true."""
        return self.sample_index[:, None] * seq_length + self.position_ids()


def anchor_candidates(loss_mask: Tensor) -> Tensor:
    """Positions a with `loss_mask[a]` and `loss_mask[a + 1]`. [s] bool -> ascending [c] int64."""
    mask = loss_mask.bool()
    return (mask[:-1] & mask[1:]).nonzero().flatten()


def anchor_seed(seed: int, epoch: int, sample_index: int) -> int:
    """The seed of one use of a sample."""
    return derived_seed("anchors", seed, epoch, sample_index)


def sample_anchors(loss_mask: Tensor, num_anchors: int, seed: int) -> Tensor:
    """At most `num_anchors` candidates, uniform without replacement, ascending. [s] -> [n]."""
    candidates = anchor_candidates(loss_mask)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(candidates.numel(), generator=generator)[:num_anchors]
    return candidates[chosen].sort().values


def draft_blocks(
    input_ids: Tensor, loss_mask: Tensor, anchors: list[Tensor], block_size: int
) -> DraftBlocks:
    """Blocks of a micro-batch. input_ids, loss_mask: [b, s] right-padded (padding has loss_mask 0);
    anchors: the anchor positions of each sample."""
    seq_length = input_ids.shape[1]
    sample_index = torch.cat([torch.full_like(a, i) for i, a in enumerate(anchors)])
    positions = torch.cat(anchors)
    label_positions = positions[:, None] + torch.arange(1, block_size + 1)  # [n, k]
    in_bounds = label_positions < seq_length
    safe = label_positions.clamp(max=seq_length - 1)
    rows = sample_index[:, None]
    supervised = in_bounds & loss_mask.bool()[rows, safe]
    labels = torch.where(in_bounds, input_ids[rows, safe], 0)  # [n, k]
    anchor_tokens = input_ids[sample_index, positions]
    return DraftBlocks(
        sample_index=sample_index,
        anchor_positions=positions,
        labels=labels,
        prev_token_ids=torch.cat([anchor_tokens[:, None], labels[:, :-1]], dim=1),
        eval_mask=supervised.int().cumprod(dim=1).bool(),
        candidates=sum(anchor_candidates(row).numel() for row in loss_mask),
    )


def slot_weights(block_size: int, loss_decay_gamma: float | None) -> Tensor:
    """[k] loss weight of each slot: exp(-k / gamma), or ones (paper Eq. 9)."""
    slots = torch.arange(block_size, dtype=torch.float32)
    return torch.ones(block_size) if loss_decay_gamma is None else (-slots / loss_decay_gamma).exp()
