"""One optimizer step: target states, draft, loss and gradients of every micro-batch."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from dspark_megatron.config import LossConfig
from dspark_megatron.model.draft_model import DraftOutput
from dspark_megatron.ops.anchors import DraftBlocks
from dspark_megatron.targets.base import Target, TargetStates
from dspark_megatron.training.draft_loss import DraftLoss
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
    first forward pass and gradients are simply summed. The other forms of `loss.normalization`
    give each micro-batch a divisor of its own, such that summing takes the mean of them.
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
        self.dp_group, self.device = dp_group, device
        self.draft_loss = DraftLoss(loss, model.module, tp_group=tp_group, device=device)

    def run(self, micro_batches: list[MicroBatch], metrics: MetricSums) -> None:
        """Leave the step's gradients in the model's buckets, reduced; add to `metrics`."""
        self.model.zero_grad_buffer()
        divisors = self._divisors(micro_batches)
        for micro_batch, divisor in zip(micro_batches, divisors, strict=True):
            self._forward_backward(micro_batch, divisor, metrics)
        finalize_model_grads([self.model])

    def _divisors(self, micro_batches: list[MicroBatch]) -> list[float]:
        """One number for each micro-batch; 0 where there is nothing to learn. One all-reduce of a
        double per micro-batch, none for the local forms."""
        form = self.loss.normalization
        slots = self.draft_loss.slots
        if form == "local_count":
            slots = torch.ones_like(slots)
        weights = torch.tensor(
            [micro_batch.weight(slots) for micro_batch in micro_batches],
            dtype=torch.float64,
            device=self.device,
        )
        if form in ("local", "local_count"):
            return (weights * len(micro_batches) * self.dp_group.size()).tolist()
        if self.dp_group.size() > 1:
            dist.all_reduce(weights, group=self.dp_group)
        if form == "global_step":
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
        )
        # A small loss_decay_gamma may round the weight of late slots, and of all there are, to 0.
        if blocks.num_blocks == 0 or divisor == 0:  # the same on every tensor-parallel rank
            if self.target.lockstep:
                self.target.states(micro_batch.input_ids)
            return
        metrics.add(blocks=blocks.num_blocks, rows=float(blocks.eval_mask.sum()))
        states = self.target.states(micro_batch.input_ids)
        output = self._draft(micro_batch, states)
        loss = self.draft_loss(blocks, states, output, metrics)
        (loss / divisor).backward()

    def _draft(self, micro_batch: MicroBatch, states: TargetStates) -> DraftOutput:
        blocks = micro_batch.blocks
        context = blocks.visible_context(micro_batch.input_ids.shape[1])
        return self.model(
            states.taps.flatten(0, 1)[context.index.to(self.device)],
            context.positions.to(self.device),
            blocks.prev_token_ids.to(self.device),
            blocks.position_ids().to(self.device),
            context.ranges,
        )
