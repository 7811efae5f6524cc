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
from dspark_megatron.ops.head_loss import HeadLoss, HeadLossOutput, Weights
from dspark_megatron.ops.logit_transform import IDENTITY, LogitTransform
from dspark_megatron.ops.objective.acceptance_weights import AcceptanceWeights, reach
from dspark_megatron.ops.objective.objective import Objective
from dspark_megatron.targets.base import StatesSource, TargetStates
from dspark_megatron.training.metrics import MetricSums
from dspark_megatron.training.watching.step_parts import StepParts


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
        self.loss, self.target, self.device = loss, target, device
        self.last: SlotTerms | None = None
        """Of the last micro-batch; None where nothing is learnt."""
        has_head = draft.confidence_head is not None
        self.confidence_alpha = loss.confidence_head_alpha if has_head else 0.0
        self.with_target = loss.needs_target_logits(with_confidence_head=has_head)
        self.parts = StepParts(device)
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

    def learns(self, batch: MicroBatch) -> bool:
        """Whether something is learnt from it: known on the host, on all tensor-parallel ranks
        alike."""
        return self._slots_weight(batch.blocks) > 0

    def divisor(self, batch: MicroBatch) -> float:
        """What it brings into the number that the sums of a step are divided by: its samples, or
        the weight of its slots."""
        if self.loss.normalization == "global_samples":
            return len(batch.lengths)
        return self._slots_weight(batch.blocks)

    def _slots_weight(self, blocks: DraftBlocks) -> float:
        """Weights that come out of the forward pass count as 1."""
        return blocks.weight if self.loss.weighting.name == "decay" else len(blocks.labels)

    def expect(self, batches: Sequence[MicroBatch]) -> None:
        """Called before those of a step, in their order: the target is told of those whose states
        will be asked for."""
        self.target.expect(self.asked_for(batches))

    def asked_for(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Those whose states the target is asked for."""
        return [x for x in batches if self.learns(x) or self.target.lockstep]

    def __call__(self, batch: MicroBatch, model: Any, metrics: MetricSums) -> Tensor | None:
        """[] with gradients; None where nothing is learnt. Adds to `metrics`. model: the draft, or
        what a loop has wrapped it in."""
        self.last, blocks, lengths = None, batch.blocks, batch.lengths
        metrics.add(samples=len(lengths), tokens=sum(lengths), candidates=blocks.candidates)
        metrics.add(divisor=self.divisor(batch))
        if not self.learns(batch):
            if self.target.lockstep:
                self._target_states(batch, metrics)
            return None
        metrics.add(blocks=len(blocks.eval_mask), slots=len(blocks.labels))
        batch = batch.to(self.device)
        states = self._target_states(batch, metrics)
        stop = {"confidence_stop_gradient": True} if self.loss.confidence_stop_gradient else {}
        output = model(states.taps, batch.blocks, **stop)

        of, blocks = batch.blocks.supervised, batch.blocks
        result = self.head_loss(
            of(output.hidden),
            None if output.latents is None else of(output.latents),
            self._target_hidden(blocks, states, output.hidden.dtype),
            blocks.labels,
            self._weights(blocks),
        )
        self.last = SlotTerms(batch.sample_indices, blocks.target_samples, result.terms)
        _add_terms(blocks, result, metrics)
        loss = result.loss
        if self.confidence_alpha > 0:
            logits = of(output.confidence_logits)
            loss = loss + self.confidence_alpha * self._confidence(logits, result, blocks, metrics)
        metrics.add(loss_sum=loss.detach())
        return loss

    def _weights(self, blocks: DraftBlocks) -> Weights:
        name, alpha = self.loss.weighting.name, self.loss.weighting.alpha
        if name == "decay":
            return blocks.weights
        return AcceptanceWeights(name, alpha, blocks.slots)

    def _confidence(
        self, logits: Tensor, result: HeadLossOutput, blocks: DraftBlocks, metrics: MetricSums
    ) -> Tensor:
        """Weighted binary cross entropy with the accept rate as its (constant) label."""
        rate, weights = result.accept_rate, blocks.weights
        bce = F.binary_cross_entropy_with_logits(logits, rate, reduction="none")
        total = (bce * weights).sum()
        error = logits.detach().sigmoid() - rate
        metrics.add(
            confidence_sum=total.detach(),
            confidence_error_sum=(error.abs() * weights).sum(),
            confidence_bias_sum=(error * weights).sum(),
        )
        if self.loss.confidence_weights == "reach":
            return (bce * reach(rate, blocks.slots)).sum()
        return total

    def _target_states(self, batch: MicroBatch, metrics: MetricSums) -> TargetStates:
        with self.parts.part("target"):
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
                "the L1, KL and confidence terms and dpard's weights compare with the target, but "
                "its last hidden states are missing; provide them, or train with cross entropy "
                "alone (loss.terms={ce: 1} loss.weighting.name=decay loss.ce_labels=data "
                "model.enable_confidence_head=false)"
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
