"""Anchors of a sample and the blocks they start.

A block belongs to one anchor: slot k holds position `anchor + k` and predicts token
`anchor + k + 1`. Everything here is made on the CPU, where the data is, from the data and a seed
alone, so it is the same on every tensor-parallel rank and for every layout.

Shapes: b samples, s tokens, n blocks of the whole micro-batch (only real ones: no filler), k slots,
t context tokens that some block sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspark_megatron.config import LossConfig
from dspark_megatron.ops.seeds import derived_seed


@dataclass(frozen=True)
class BlockRules:
    """Which positions are anchors and which slots are learnt; LossConfig says what each means."""

    anchor_rule: str
    supervised_slots: str
    slot_mask: str

    @classmethod
    def of(cls, loss: LossConfig) -> "BlockRules":
        return cls(loss.anchor_rule, loss.supervised_slots, loss.slot_mask)


DEFAULT_RULES = BlockRules.of(LossConfig())


@dataclass(frozen=True)
class VisibleContext:
    """The context that some block of a micro-batch sees, packed sample by sample; on the CPU."""

    samples: Tensor
    """[t] row of the micro-batch."""
    positions: Tensor
    """[t] position in that sample."""
    ranges: list[tuple[int, int]]
    """For each block the half-open range of the t tokens that it sees: those of its sample,
    strictly before its anchor. Ranges of one sample start alike, those of two never do."""


@dataclass(frozen=True)
class DraftBlocks:
    """The blocks of a micro-batch of right-padded samples, each with a slot to learn; all tensors
    on the CPU."""

    sample_index: Tensor
    """[n] row of the micro-batch that the block belongs to; ascending."""
    anchor_positions: Tensor
    """[n] position of the anchor in its sample; ascending within a sample."""
    labels: Tensor
    """[n, k] ground-truth next tokens; 0 past the end of the sample."""
    prev_token_ids: Tensor
    """[n, k] token before each label; slot 0 sees the anchor."""
    eval_mask: Tensor
    """[n, k] bool: the supervised slots, at least one in each block."""
    candidates: int
    """Anchors that could have been sampled in the micro-batch."""

    @property
    def num_blocks(self) -> int:
        return self.labels.shape[0]

    def position_ids(self) -> Tensor:
        """[n, k]: slot k stands at `anchor + k`."""
        return self.anchor_positions[:, None] + torch.arange(self.labels.shape[1])

    def visible_context(self) -> VisibleContext:
        """What stands before the last anchor of each sample; there must be a block."""
        samples, blocks = self.sample_index.unique_consecutive(return_counts=True)
        # An anchor at 0 sees nothing, but one token keeps every tensor and collective from being
        # empty, and the ranges of two samples from starting alike.
        sizes = self.anchor_positions[blocks.cumsum(0) - 1].clamp(min=1)
        positions = torch.cat([torch.arange(size) for size in sizes.tolist()])  # [t]
        starts = (sizes.cumsum(0) - sizes).repeat_interleave(blocks)  # [n]
        ends = starts + self.anchor_positions
        return VisibleContext(
            samples=samples.repeat_interleave(sizes),
            positions=positions,
            ranges=list(zip(starts.tolist(), ends.tolist(), strict=True)),
        )

    def part(self, blocks: slice) -> "DraftBlocks":
        """Some of the blocks; `candidates` stays that of the micro-batch."""
        tensors = ("sample_index", "anchor_positions", "labels", "prev_token_ids", "eval_mask")
        return replace(self, **{name: getattr(self, name)[blocks] for name in tensors})


def anchor_candidates(loss_mask: Tensor, rules: BlockRules = DEFAULT_RULES) -> Tensor:
    """Positions of a sample that may be anchors: in the loss mask, not the last, and with the
    rule `label` the next one is in the mask, too. [s] bool -> ascending [c] int64."""
    mask = loss_mask.bool()
    allowed = mask[:-1] & mask[1:] if rules.anchor_rule == "label" else mask[:-1]
    return allowed.nonzero().flatten()


def has_block(loss_mask: Tensor, block_size: int, rules: BlockRules = DEFAULT_RULES) -> bool:
    """Whether some candidate of a sample starts a block with a supervised slot. [s] bool."""
    anchors = anchor_candidates(loss_mask, rules)
    if rules.anchor_rule == "label" or not len(anchors):
        return len(anchors) > 0  # slot 0 is supervised wherever both its tokens are in the mask
    ids = torch.zeros_like(loss_mask, dtype=torch.int64)
    return len(_sample_blocks(ids, loss_mask, anchors, block_size, rules)[0]) > 0


def anchor_seed(seed: int, epoch: int, sample_index: int) -> int:
    """The seed of one use of a sample."""
    return derived_seed("anchors", seed, epoch, sample_index)


def sample_anchors(
    loss_mask: Tensor, num_anchors: int, seed: int, rules: BlockRules = DEFAULT_RULES
) -> Tensor:
    """At most `num_anchors` candidates, uniform without replacement, ascending. [s] -> [n]."""
    candidates = anchor_candidates(loss_mask, rules)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(candidates.numel(), generator=generator)[:num_anchors]
    return candidates[chosen].sort().values


def draft_blocks(
    input_ids: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
    anchors: Sequence[Tensor],
    block_size: int,
    rules: BlockRules = DEFAULT_RULES,
) -> DraftBlocks:
    """Blocks of a micro-batch, but for those without a supervised slot. For each sample its
    input_ids and loss_mask [s] before padding, so that no label lies in it, and its anchors."""
    parts = [
        _sample_blocks(*sample, block_size, rules)
        for sample in zip(input_ids, loss_masks, anchors, strict=True)
    ]
    positions, tokens, eval_mask = (torch.cat(part) for part in zip(*parts, strict=True))
    return DraftBlocks(
        sample_index=torch.cat([torch.full_like(part[0], i) for i, part in enumerate(parts)]),
        anchor_positions=positions,
        labels=tokens[:, 1:],
        prev_token_ids=tokens[:, :-1],
        eval_mask=eval_mask,
        candidates=sum(anchor_candidates(mask, rules).numel() for mask in loss_masks),
    )


def _sample_blocks(
    input_ids: Tensor, loss_mask: Tensor, anchors: Tensor, block_size: int, rules: BlockRules
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of one sample: anchors [n], the anchor's token and the labels [n, k + 1], supervised
    slots [n, k]."""
    positions = anchors[:, None] + torch.arange(block_size + 1)  # [n, k + 1]
    inside = positions < len(input_ids)
    safe = positions.clamp(max=len(input_ids) - 1)
    tokens = torch.where(inside, input_ids[safe], 0)
    in_mask = loss_mask.bool()[safe]
    deciding = in_mask[:, 1:] if rules.slot_mask == "label" else in_mask[:, :-1]
    supervised = inside[:, 1:] & deciding  # [n, k]
    if rules.supervised_slots == "prefix":
        supervised = supervised.int().cumprod(dim=1).bool()
    keep = supervised.any(dim=1)
    return anchors[keep], tokens[keep], supervised[keep]


def slot_weights(block_size: int, loss_decay_gamma: float | None) -> Tensor:
    """[k] loss weight of each slot: exp(-k / gamma), or ones (paper Eq. 9)."""
    slots = torch.arange(block_size, dtype=torch.float32)
    return torch.ones(block_size) if loss_decay_gamma is None else (-slots / loss_decay_gamma).exp()
