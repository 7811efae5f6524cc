"""A micro-batch through target and draft to its loss: the same in our loop and in Megatron's.

Shapes: n blocks, r supervised slots, h hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dspark_megatron.config import LossConfig
from dspark_megatron.data.batch import MicroBatch
from dspark_megatron.data.blocks import DraftBlocks
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.ops.acceptance import tau
from dspark_megatron.ops.chunk_budget import chunk_rows
from dspark_megatron.ops.head_loss import HeadLoss, HeadLossOutput
from dspark_megatron.ops.logit_transform import IDENTITY, LogitTransform
from dspark_megatron.ops.objective.objective import Objective
from dspark_megatron.targets.base import StatesSource, TargetStates
from dspark_megatron.training.metrics import MetricSums


@dataclass(frozen=True)
class SlotTerms:
    """What each supervised slot of a micro-batch lost, on the device: looked at when a step goes
    wrong."""

    sample_indices: tuple[int, ...]
    """Of the micro-batch, in the data."""
    samples: Tensor
    """[r] the slot's sample, by its number in the micro-batch."""
    terms: dict[str, Tensor]
    """[r] by name."""

    def by_sample(self) -> list[dict[str, float]]:
        """The mean of each term, for each sample of the micro-batch; none where it has no slot."""
        own = [self.samples == i for i in range(len(self.sample_indices))]
        return [
            {name: term[mask].mean().item() for name, term in self.terms.items() if mask.any()}
            for mask in own
        ]


class ForwardStep:
    """The weighted sum of the loss over supervised slots; the loop divides it."""

    def __init__(
        self,
        loss: LossConfig,
        draft: DSparkDraftModel,
        target: StatesSource,
        target_transform: LogitTransform = IDENTITY,
        *,
        tp_group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """target_transform: of the target's logits."""
        self.target, self.device = target, device
        self.last: SlotTerms | None = None
        """Of the last micro-batch; None where nothing is learnt."""
        has_head = draft.confidence_head is not None
        self.confidence_alpha = loss.confidence_head_alpha if has_head else 0.0
        self.with_target = loss.needs_target_logits(with_confidence_head=has_head)
        # Wrappers and optimizers fill the parameters anew and never replace them.
        self.objective, head = Objective.of(loss), draft.head_weights()
        size = len(head.lm_head), head.lm_head.dtype
        rows = chunk_rows(loss, *size, with_target=self.with_target, capped=head.is_capped)
        how = rows, loss.is_compiled(device.type), target_transform
        self.head_loss = HeadLoss(head, self.objective, *how, tp_group=tp_group)

    @property
    def term_weights(self) -> dict[str, float]:
        """Weight of each term in use, by its name in the metrics."""
        terms = self.objective.weights
        if not self.with_target:
            del terms["l1"]
        if self.confidence_alpha > 0:
            terms["confidence"] = self.confidence_alpha
        return terms

    def expect(self, batches: Sequence[MicroBatch]) -> None:
        """Called before those of a step, in their order: the target is told of those whose states
        will be asked for."""
        self.target.expect([x for x in batches if x.blocks.weight > 0 or self.target.lockstep])

    def __call__(self, batch: MicroBatch, model: Any, metrics: MetricSums) -> Tensor | None:
        """[] with gradients; None where nothing is learnt. Adds to `metrics`. model: the draft, or
        what a loop has wrapped it in."""
        self.last, blocks, lengths = None, batch.blocks, batch.lengths
        metrics.add(samples=len(lengths), tokens=sum(lengths), candidates=blocks.candidates)
        if blocks.weight == 0:  # on every tensor-parallel rank alike
            if self.target.lockstep:
                self._target_states(batch, metrics)
            return None
        metrics.add(blocks=len(blocks.eval_mask), slots=len(blocks.labels))
        batch = batch.to(self.device)
        states = self._target_states(batch, metrics)
        output = model(states.taps, batch.blocks)

        of, blocks = batch.blocks.supervised, batch.blocks
        result = self.head_loss(
            of(output.hidden),
            None if output.latents is None else of(output.latents),
            self._target_hidden(blocks, states, output.hidden.dtype),
            blocks.labels,
            blocks.weights,
        )
        self.last = SlotTerms(batch.sample_indices, blocks.target_samples, result.terms)
        _add_terms(blocks, result, metrics)
        if self.confidence_alpha == 0:
            return result.loss
        logits = of(output.confidence_logits)
        confidence_sum = _confidence(logits, result.accept_rate, blocks.weights, metrics)
        return result.loss + self.confidence_alpha * confidence_sum

    def _target_states(self, batch: MicroBatch, metrics: MetricSums) -> TargetStates:
        states = self.target.states(batch)
        if states.positions is not None:
            padding = states.positions - sum(batch.lengths)
            metrics.add(positions=states.positions, padding=padding)
        return states

    def _target_hidden(
        self, blocks: DraftBlocks, states: TargetStates, dtype: torch.dtype
    ) -> Tensor | None:
        """[r, h] states of the target that predict the supervised labels."""
        if not self.with_target:
            return None
        if states.last_hidden is None:
            raise ValueError(
                "the L1, KL and confidence terms compare with the target, but its last hidden "
                "states are missing; provide them, or train with cross entropy alone "
                "(loss.terms={ce: 1} loss.ce_labels=data model.enable_confidence_head=false)"
            )
        return blocks.target_of(states.last_hidden).to(dtype)


def _add_terms(blocks: DraftBlocks, result: HeadLossOutput, metrics: MetricSums) -> None:
    weights = blocks.weights
    sums = {f"{name}_sum": (weights * term).sum() for name, term in result.terms.items()}
    metrics.add(weight=weights.sum(), **sums)
    if "l1" not in result.terms:
        return
    accept_rates = blocks.by_slot(result.accept_rate.to(weights.dtype))
    metrics.add(
        accept_sum=accept_rates.sum(dim=0),
        accept_count=blocks.eval_mask.sum(dim=0),
        tau_sum=tau(accept_rates, blocks.eval_mask).sum(),
    )


def _confidence(
    logits: Tensor, accept_rate: Tensor, weights: Tensor, metrics: MetricSums
) -> Tensor:
    """Weighted binary cross entropy with the accept rate as its (constant) label."""
    bce = F.binary_cross_entropy_with_logits(logits, accept_rate, reduction="none")
    total = (bce * weights).sum()
    error = logits.detach().sigmoid() - accept_rate
    metrics.add(
        confidence_sum=total.detach(),
        confidence_error_sum=(error.abs() * weights).sum(),
        confidence_bias_sum=(error * weights).sum(),
    )
    return total
