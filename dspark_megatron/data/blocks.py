"""Anchors of a sample and the blocks they start.

A block belongs to one anchor and drafts the tokens after it. Slots are counted here from the first
that drafts: slot j follows the token at `anchor + j` and predicts that at `anchor + j + 1`. Whether
the draft has one more before them, which only carries the anchor (`model.sample_from_anchor`), is
known to its `backbone` alone.

Blocks are made on the host, where the data is, from the data and a seed alone, so they are the same
on every tensor-parallel rank and for every layout; a GPU would have to be waited for to count
supervised slots.

Shapes: b samples, s tokens, n blocks of the whole micro-batch (only real ones: no filler), d slots
that draft, t context tokens that some block sees, r supervised slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_megatron.config import LossConfig
from dspark_megatron.ops.objective.acceptance_weights import BlockSlots
from dspark_megatron.ops.seeds import derived_seed
from dspark_megatron.ops.transfer import ContextRanges, all_to_device

DEFAULT_LOSS = LossConfig()


@dataclass(frozen=True)
class DraftBlocks:
    """The blocks of a micro-batch, each with a slot to learn, and the indices by which the draft
    and its loss read context and labels. int64 where nothing else is said."""

    sample_index: Tensor
    """[n] sample of the micro-batch that the block belongs to; ascending."""
    positions: Tensor
    """[n, d] of the token before each label, and of the target's state that predicts it:
    `anchor + j`. Anchors ascend within a sample."""
    tokens: Tensor
    """[n, d + 1] the anchor's and the ground-truth next ones; 0 past the end of the sample."""
    eval_mask: Tensor
    """[n, d] bool: the supervised slots, at least one in each block."""
    context_samples: Tensor
    """[t] sample of each context token: those that some block sees."""
    context_positions: Tensor
    """[t] position in that sample."""
    context_bounds: Tensor
    """[n, 2] half-open range of the t tokens that the block sees: those of its sample, strictly
    before its anchor, all or the last `reach`. Ranges of two samples do not overlap."""
    bounds_on_host: list[tuple[int, int]]
    """The same numbers."""
    slot_index: Tensor
    """[r] supervised slots of the flattened [n * d]."""
    labels: Tensor
    """[r] ground-truth next tokens."""
    target_samples: Tensor
    """[r] sample of the target state that predicts the label."""
    target_positions: Tensor
    """[r] its position there."""
    slots_on_host: list[int]
    """Supervised slots of each block."""
    weights: Tensor
    """[r] fp32 weights by the slot alone, which decay."""
    loss_decay_gamma: float | None
    """That they come from."""
    weight: float
    """Their sum; 0 where nothing is learnt."""
    candidates: int
    """Anchors that could have been sampled in the micro-batch."""
    reach: int | None = None
    """Tokens before its anchor that a block sees at most; None: all."""

    @classmethod
    def of(
        cls,
        sample_index: Tensor,
        positions: Tensor,
        tokens: Tensor,
        eval_mask: Tensor,
        *,
        loss_decay_gamma: float | None,
        candidates: int,
        reach: int | None = None,
    ) -> "DraftBlocks":
        context = _seen_context(sample_index, positions[:, 0], reach)
        weights = slot_weights(positions.shape[1], loss_decay_gamma)
        return cls(
            sample_index=sample_index,
            positions=positions,
            tokens=tokens,
            eval_mask=eval_mask,
            context_samples=context.samples,
            context_positions=context.positions,
            context_bounds=context.bounds,
            bounds_on_host=list(map(tuple, context.bounds.tolist())),
            slot_index=eval_mask.flatten().nonzero().squeeze(1),
            labels=tokens[:, 1:][eval_mask],
            target_samples=sample_index[:, None].expand_as(eval_mask)[eval_mask],
            target_positions=positions[eval_mask],
            slots_on_host=eval_mask.sum(dim=1).tolist(),
            weights=weights.expand(eval_mask.shape)[eval_mask],
            loss_decay_gamma=loss_decay_gamma,
            # A small loss_decay_gamma may round the weight of late slots, and of all, to 0.
            weight=float((eval_mask.double() * weights).sum()),
            candidates=candidates,
            reach=reach,
        )

    def part(self, blocks: slice) -> "DraftBlocks":
        """Some of the blocks; `candidates` stays that of the micro-batch."""
        kept = (self.sample_index, self.positions, self.tokens, self.eval_mask)
        return DraftBlocks.of(
            *(tensor[blocks] for tensor in kept),
            loss_decay_gamma=self.loss_decay_gamma,
            candidates=self.candidates,
            reach=self.reach,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> "DraftBlocks":
        """The same on the device, in one transfer."""
        moved: dict[str, Any] = all_to_device(self.tensors, device)
        return replace(self, **moved)

    @property
    def prev_token_ids(self) -> Tensor:
        """[n, d] token before each label; slot 0 sees the anchor."""
        return self.tokens[:, :-1]

    @property
    def slots(self) -> BlockSlots:
        """Where the supervised slots stand."""
        return BlockSlots(self.slots_on_host, self.slot_index, self.eval_mask.shape[1])

    @property
    def context_ranges(self) -> ContextRanges:
        return ContextRanges(self.bounds_on_host, self.context_bounds)

    def context_of(self, taps: Tensor) -> Tensor:
        """[b, s, x] -> [t, x]"""
        return taps[self.context_samples, self.context_positions]

    def target_of(self, last_hidden: Tensor) -> Tensor:
        """[b, s, h] -> [r, h]"""
        return last_hidden[self.target_samples, self.target_positions]

    def supervised(self, by_slot: Tensor) -> Tensor:
        """[n, d, ...] -> [r, ...]"""
        return by_slot.flatten(0, 1).index_select(0, self.slot_index)

    def by_slot(self, values: Tensor) -> Tensor:
        """[r] -> [n, d]; 0 where a slot is not supervised."""
        return self.slots.by_block(values, 0)


class _Context(NamedTuple):
    samples: Tensor
    """[t]"""
    positions: Tensor
    """[t]"""
    bounds: Tensor
    """[n, 2]"""


def _seen_context(sample_index: Tensor, anchors: Tensor, reach: int | None) -> _Context:
    """The tokens that blocks see, each once; sample_index [n], anchors [n] ascend in a sample."""
    same = sample_index[1:] == sample_index[:-1]
    before = F.pad(anchors[:-1] * same, (min(1, len(anchors)), 0))  # anchor of the block before
    starts = torch.zeros_like(anchors) if reach is None else (anchors - reach).clamp(min=0)
    first = torch.maximum(starts, before)  # what stands before it, earlier blocks have brought
    # A sample whose blocks see nothing (an anchor at 0) still brings one token, which keeps every
    # tensor and collective from being empty, and the ranges of two samples from starting alike.
    is_last = ~F.pad(same, (0, min(1, len(anchors))))
    extra = (is_last & (anchors == starts)).long()
    counts = anchors - first + extra
    after = counts.cumsum(0)
    shift = (first + counts - after).repeat_interleave(counts)
    ends = after - extra
    return _Context(
        samples=sample_index.repeat_interleave(counts),
        positions=torch.arange(len(shift)) + shift,
        bounds=torch.stack([ends - (anchors - starts), ends], dim=1),
    )


def anchor_candidates(loss_mask: Tensor, loss: LossConfig = DEFAULT_LOSS) -> Tensor:
    """Positions of a sample that may be anchors: in the loss mask, not the last, and with the
    rule `label` the next one is in the mask, too. [s] bool -> ascending [c] int64."""
    mask = loss_mask.bool()
    allowed = mask[:-1] & mask[1:] if loss.anchor_rule == "label" else mask[:-1]
    return allowed.nonzero().flatten()


def has_block(loss_mask: Tensor, num_draft_tokens: int, loss: LossConfig = DEFAULT_LOSS) -> bool:
    """Whether some candidate of a sample starts a block with a supervised slot. [s] bool."""
    anchors = anchor_candidates(loss_mask, loss)
    if loss.anchor_rule == "label" or not len(anchors):
        return len(anchors) > 0  # slot 0 is supervised wherever both its tokens are in the mask
    return bool(supervised_slots(loss_mask, anchors, num_draft_tokens, loss).any())


def anchor_seed(seed: int, epoch: int, sample_index: int) -> int:
    """The seed of one use of a sample."""
    return derived_seed("anchors", seed, epoch, sample_index)


def sample_anchors(
    loss_mask: Tensor, num_anchors: int, seed: int, loss: LossConfig = DEFAULT_LOSS
) -> Tensor:
    """At most `num_anchors` candidates, uniform without replacement, ascending. [s] -> [n]."""
    candidates = anchor_candidates(loss_mask, loss)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(candidates.numel(), generator=generator)[:num_anchors]
    return candidates[chosen].sort().values


def draft_blocks(
    input_ids: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
    anchors: Sequence[Tensor],
    num_draft_tokens: int,
    loss: LossConfig = DEFAULT_LOSS,
    *,
    reach: int | None = None,
) -> DraftBlocks:
    """Blocks of a micro-batch, but for those without a supervised slot. For each sample its
    input_ids and loss_mask [s] before padding, so that no label lies in it, and its anchors.
    reach: tokens before an anchor that the draft sees at most; None: all."""
    parts = []
    for i, (ids, mask, own) in enumerate(zip(input_ids, loss_masks, anchors, strict=True)):
        supervised = supervised_slots(mask, own, num_draft_tokens, loss)
        keep = supervised.any(dim=1)
        positions = own[keep, None] + torch.arange(num_draft_tokens + 1)  # [n, d + 1]
        tokens = ids[positions.clamp(max=len(ids) - 1)].where(positions < len(ids), 0)
        index = torch.full_like(positions[:, 0], i)
        parts.append((index, positions[:, :-1], tokens, supervised[keep]))
    return DraftBlocks.of(
        *(torch.cat(part) for part in zip(*parts, strict=True)),
        loss_decay_gamma=loss.loss_decay_gamma,
        candidates=sum(anchor_candidates(mask, loss).numel() for mask in loss_masks),
        reach=reach,
    )


def supervised_slots(
    loss_mask: Tensor, anchors: Tensor, num_draft_tokens: int, loss: LossConfig
) -> Tensor:
    """[n, d] bool of anchors [n] of a sample: the slots that are learnt."""
    positions = anchors[:, None] + torch.arange(num_draft_tokens + 1)  # [n, d + 1]
    in_mask = loss_mask.bool()[positions.clamp(max=len(loss_mask) - 1)]
    deciding = in_mask[:, 1:] if loss.slot_mask == "label" else in_mask[:, :-1]
    supervised = deciding & (positions[:, 1:] < len(loss_mask))
    if loss.supervised_slots == "prefix":
        supervised = supervised.int().cumprod(dim=1).bool()
    return supervised


def slot_weights(num_draft_tokens: int, loss_decay_gamma: float | None) -> Tensor:
    """[d] loss weight of each slot: exp(-j / gamma), or ones (paper Eq. 9)."""
    slots = torch.arange(num_draft_tokens, dtype=torch.float32)
    return torch.ones_like(slots) if loss_decay_gamma is None else (-slots / loss_decay_gamma).exp()
