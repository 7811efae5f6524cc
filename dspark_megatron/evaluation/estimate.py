"""What a draft would gain, estimated from held-out answers without generating anything.

The target reads each answer once and the draft drafts from every anchor of it, teacher forced. That
gives the accept rate of every slot, and with it the chance that a decoder which writes this answer
starts a round at each anchor; figures are means over those rounds, as those of real decoding.

Shapes: b samples of s tokens, n blocks, d draft tokens of each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.config import Config
from dspark_megatron.data.batch import Batch, padded
from dspark_megatron.data.blocks import DraftBlocks, anchor_candidates, draft_blocks
from dspark_megatron.data.conversation import Sample
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.ops.acceptance import accept_rates, round_starts, tau
from dspark_megatron.ops.chunk_budget import chunk_rows
from dspark_megatron.ops.logit_transform import LogitFactors, TargetHead
from dspark_megatron.shape import DraftShape
from dspark_megatron.targets.base import Target, TargetStates


@dataclass(frozen=True)
class EstimateSettings:
    """At which temperature, and how much at a time."""

    temperature: float
    """Of target and draft; 0 is greedy."""
    micro_batch_size: int
    """Samples of one forward pass of the target."""
    max_blocks: int
    """Blocks of one forward pass of the draft."""
    chunk_rows: int
    """Slots whose logits exist at one time."""

    @classmethod
    def of(
        cls, config: Config, draft: DSparkDraftModel, *, samples_per_pass: int | None = None
    ) -> "EstimateSettings":
        """`evaluate.temperature`, and no more at a time than a training step takes.
        samples_per_pass: of the target; None: a micro-batch."""
        head = draft.lm_head
        size = config.train.micro_batch_size
        return cls(
            temperature=config.evaluate.temperature,
            micro_batch_size=samples_per_pass or size,
            max_blocks=size * config.model.num_anchors,
            chunk_rows=chunk_rows(config.loss, len(head), head.dtype, with_target=True),
        )


def answer_sample(prompt: list[int], answer: list[int]) -> Sample:
    """A decoded answer, its prompt before it, as the estimate reads it."""
    mask = [False] * len(prompt) + [True] * len(answer)
    return Sample(torch.tensor(prompt + answer), torch.tensor(mask))


@torch.no_grad()
def estimate_acceptance(
    draft: DSparkDraftModel,
    target: Target,
    target_head: TargetHead,
    samples: Sequence[Sample],
    settings: EstimateSettings,
    *,
    dp_group: dist.ProcessGroup,
) -> dict[str, Any]:
    """Expected figures of decoding these answers, the same on every rank; all ranks call it with
    the same samples, which data-parallel ranks share out.

    `tau`, `accept_rate` and `prefix_survival` mean what they mean of real decoding
    (`figures.acceptance`); `block_tau` is the training metric `tau`: the mean over blocks, whether
    or not a round would start there. A figure with nothing to count is null. One all-reduce of
    3 + 3d doubles over dp_group, beside what the passes of target and draft send.
    """
    sums = _Sums(draft.shape.num_draft_tokens)
    for batch in _shares(samples, settings.micro_batch_size, dp_group):
        if not batch:
            if target.lockstep:  # others still need this rank's part of the weights
                target.states(Batch(samples[0].input_ids[None]))
            continue
        blocks = _every_block(batch, draft.shape)
        states = target.states(Batch(padded([sample.input_ids for sample in batch])))
        rates = _accept_rates(draft, target_head, states, blocks, settings)
        for i in range(len(batch)):
            own = blocks.sample_index == i
            sums.add(rates[own], blocks.eval_mask[own], blocks.positions[own, 0])
    return sums.figures(len(samples), target_head.weight.device, dp_group=dp_group)


def _shares(
    samples: Sequence[Sample], size: int, dp_group: dist.ProcessGroup
) -> Iterator[Sequence[Sample]]:
    """This rank's micro-batches, as many as any other's; the last may be empty."""
    for start in range(0, len(samples), size * dp_group.size()):
        first = start + size * dp_group.rank()
        yield samples[first : first + size]


def _every_block(batch: Sequence[Sample], shape: DraftShape) -> DraftBlocks:
    """The block of every anchor, by the rules of decoding whatever those of the loss are."""
    ids, masks = zip(*batch, strict=True)
    anchors = [anchor_candidates(mask) for mask in masks]
    reach = shape.attention.reach(shape.num_layers)
    return draft_blocks(ids, masks, anchors, shape.num_draft_tokens, reach=reach)


def _accept_rates(
    draft: DSparkDraftModel,
    target_head: TargetHead,
    states: TargetStates,
    blocks: DraftBlocks,
    settings: EstimateSettings,
) -> Tensor:
    """[n, d] fp32 on the CPU; 0 in slots that are not supervised."""
    rates = torch.zeros(blocks.eval_mask.shape)
    for start in range(0, len(rates), settings.max_blocks):
        part = blocks.part(slice(start, start + settings.max_blocks))
        found = accept_rates(
            *_logit_factors(draft, target_head, states, part),
            draft.vocab_shard,
            temperature=settings.temperature,
            chunk_rows=settings.chunk_rows,
            tp_group=draft.tp_group,
        )
        rates[start : start + settings.max_blocks][part.eval_mask] = found.cpu()
    return rates


def _logit_factors(
    draft: DSparkDraftModel, target_head: TargetHead, states: TargetStates, blocks: DraftBlocks
) -> tuple[LogitFactors, LogitFactors]:
    """The draft's and the target's, of every supervised slot."""
    blocks = blocks.to(states.taps.device)
    output = draft(states.taps, blocks)
    head, of = draft.head_weights(), blocks.supervised
    latents = None if output.latents is None else of(output.latents)
    features = head.features(of(output.hidden), latents)
    return head.factors(features), target_head.factors(blocks.target_of(states.hidden))


class _Sums:
    """Sums over the blocks of this rank, each weighted by the chance that a round starts there."""

    def __init__(self, num_draft_tokens: int) -> None:
        self.counts = torch.zeros(3, dtype=torch.float64)
        """Blocks, rounds, sum of the blocks' own tau."""
        self.slots = torch.zeros(3, num_draft_tokens, dtype=torch.float64)
        """Rounds in which the slot's token was kept; was reached; was proposed and judged."""

    def add(self, accept_rate: Tensor, eval_mask: Tensor, anchor_positions: Tensor) -> None:
        """All blocks of one sample, [n, d], [n, d] and [n]."""
        rate, mask = accept_rate.double(), eval_mask.double()
        starts = round_starts(accept_rate, eval_mask, anchor_positions)
        block_tau = tau(rate, eval_mask)
        self.counts += torch.stack([mask.new_tensor(len(mask)), starts.sum(), block_tau.sum()])
        kept = (rate * mask).cumprod(dim=1)
        reached = torch.cat([mask[:, :1], kept[:, :-1] * mask[:, 1:]], dim=1)
        # A round whose tokens are all kept, the answer's last among them, proposes no further ones.
        ended = torch.where(eval_mask, rate, 1).prod(dim=1, keepdim=True)
        judged = mask + (1 - mask) * (1 - ended)
        self.slots += torch.stack([starts @ x for x in (kept, reached, judged)])

    def figures(
        self, samples: int, device: torch.device, *, dp_group: dist.ProcessGroup
    ) -> dict[str, Any]:
        packed = torch.cat([self.counts, self.slots.flatten()]).to(device)
        if dp_group.size() > 1:
            dist.all_reduce(packed, group=dp_group)
        blocks, rounds, block_tau = packed[:3].tolist()
        kept, reached, judged = packed[3:].view_as(self.slots).tolist()
        return {
            "samples": samples,
            "rounds": rounds,
            "tau": _ratio(blocks, rounds),
            "block_tau": _ratio(block_tau, blocks),
            "accept_rate": [_ratio(*pair) for pair in zip(kept, reached, strict=True)],
            "prefix_survival": [_ratio(*pair) for pair in zip(kept, judged, strict=True)],
        }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
