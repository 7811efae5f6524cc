"""One optimizer step: target states, draft, loss and gradients of every micro-batch."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from dspark_megatron.config import LossConfig
from dspark_megatron.model.draft_model import DraftOutput
from dspark_megatron.ops.acceptance import tau
from dspark_megatron.ops.anchors import DraftBlocks, slot_weights
from dspark_megatron.ops.head_loss import head_loss
from dspark_megatron.targets.base import Target, TargetStates
from dspark_megatron.training.metrics import MetricSums


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded samples and their blocks, on the CPU."""

    input_ids: Tensor
    """[b, s]"""
    lengths: list[int]
    blocks: DraftBlocks

    def weight(self, slots: Tensor) -> float:
        """Sum of the loss weights of all supervised slots. slots [k]."""
        return float((self.blocks.eval_mask.double() * slots).sum())


class GradientStep:
    """Gradients of a step's loss, and its metrics.

    The loss of a step is `sum of weighted terms / sum of weights` over all micro-batches of all
    data-parallel ranks. The weights depend on the data alone, so the divisor is known before the
    first forward pass and gradients are simply summed. `normalization: deepspec` instead gives
    each micro-batch its own divisor and takes the mean of them.
    """

    def __init__(
        self,
        loss: LossConfig,
        model: Any,
        target: Target,
        *,
        tp_group: dist.ProcessGroup,
        dp_group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """model: the data-parallel wrapper of a DSparkDraftModel."""
        self.loss, self.model, self.target = loss, model, target
        self.tp_group, self.dp_group, self.device = tp_group, dp_group, device
        self.draft = model.module
        self.block_size = self.draft.shape.block_size
        self.slots = slot_weights(self.block_size, loss.loss_decay_gamma)
        self.with_confidence = self.draft.confidence_head is not None
        self.with_teacher = loss.l1_loss_alpha > 0 or self.with_confidence

    @property
    def alphas(self) -> tuple[float, float, float]:
        loss = self.loss
        confidence = loss.confidence_head_alpha if self.with_confidence else 0.0
        return loss.ce_loss_alpha, loss.l1_loss_alpha, confidence

    def run(self, micro_batches: list[MicroBatch], metrics: MetricSums) -> None:
        """Leave the step's gradients in the model's buckets, reduced; add to `metrics`."""
        self.model.zero_grad_buffer()
        divisors = self._divisors(micro_batches)
        for micro_batch, divisor in zip(micro_batches, divisors, strict=True):
            self._forward_backward(micro_batch, divisor, metrics)
        finalize_model_grads([self.model])

    def _divisors(self, micro_batches: list[MicroBatch]) -> list[float]:
        """One number for each micro-batch. One all-reduce of a double per micro-batch."""
        weights = torch.tensor(
            [micro_batch.weight(self.slots) for micro_batch in micro_batches],
            dtype=torch.float64,
            device=self.device,
        )
        if self.dp_group.size() > 1:
            dist.all_reduce(weights, group=self.dp_group)
        if self.loss.normalization == "global_step":
            weights = weights.sum().expand(len(micro_batches))
        else:
            weights = weights * len(micro_batches)
        return weights.tolist()

    def _forward_backward(
        self, micro_batch: MicroBatch, divisor: float, metrics: MetricSums
    ) -> None:
        blocks = micro_batch.blocks
        metrics.add(
            samples=len(micro_batch.lengths),
            tokens=sum(micro_batch.lengths),
            candidates=blocks.candidates,
            blocks=blocks.num_blocks,
            rows=float(blocks.eval_mask.sum()),
        )
        if blocks.num_blocks == 0:  # the same on every tensor-parallel rank
            return
        states = self.target.states(micro_batch.input_ids)
        output = self._draft(micro_batch, states)
        loss = self._loss(blocks, states, output, metrics)
        (loss / divisor).backward()

    def _draft(self, micro_batch: MicroBatch, states: TargetStates) -> DraftOutput:
        blocks = micro_batch.blocks
        batch, length = micro_batch.input_ids.shape
        return self.model(
            states.taps.flatten(0, 1),
            torch.arange(length, device=self.device).repeat(batch),
            blocks.prev_token_ids.to(self.device),
            blocks.position_ids().to(self.device),
            blocks.context_ranges(length),
        )

    def _loss(
        self, blocks: DraftBlocks, states: TargetStates, output: DraftOutput, metrics: MetricSums
    ) -> Tensor:
        """The micro-batch's weighted sum of all terms; supervised rows only."""
        mask = blocks.eval_mask.to(self.device)
        weights = self.slots.expand(mask.shape)[blocks.eval_mask].to(self.device)
        teacher = None
        if self.with_teacher:
            index = blocks.teacher_index(states.last_hidden.shape[1])[blocks.eval_mask]
            teacher = states.last_hidden.flatten(0, 1)[index.to(self.device)]
            teacher = teacher.to(output.hidden.dtype)
        result = head_loss(
            output.hidden[mask],
            None if output.latents is None else output.latents[mask],
            teacher,
            blocks.labels.to(self.device)[mask],
            weights,
            self.draft.head_weights(),
            ce_alpha=self.loss.ce_loss_alpha,
            l1_alpha=self.loss.l1_loss_alpha,
            chunk_rows=self.loss.chunk_rows,
            tp_group=self.tp_group,
        )
        metrics.add(
            weight=weights.sum(),
            ce_sum=(weights * result.ce).sum(),
            l1_sum=(weights * result.l1).sum(),
        )
        if self.with_teacher:
            self._add_acceptance(mask, result.accept_rate, metrics)
        if not self.with_confidence:
            return result.loss
        logits = output.confidence_logits[mask]
        confidence_sum = self._confidence(logits, result.accept_rate, weights, metrics)
        return result.loss + self.loss.confidence_head_alpha * confidence_sum

    def _add_acceptance(self, mask: Tensor, accept_rate: Tensor, metrics: MetricSums) -> None:
        by_slot = torch.zeros(mask.shape, device=self.device).masked_scatter_(mask, accept_rate)
        metrics.add(
            accept_sum=by_slot.sum(dim=0),
            accept_count=mask.sum(dim=0),
            tau_sum=tau(by_slot, mask).sum(),
        )

    def _confidence(
        self, logits: Tensor, accept_rate: Tensor, weights: Tensor, metrics: MetricSums
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
