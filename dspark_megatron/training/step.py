"""One optimizer step: target states, draft, loss and gradients of every micro-batch."""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from dspark_megatron.config import LossConfig
from dspark_megatron.data.batch import MicroBatch
from dspark_megatron.ops.logit_transform import IDENTITY, LogitTransform
from dspark_megatron.ops.transfer import to_device
from dspark_megatron.targets.base import StatesSource
from dspark_megatron.training.forward_step import ForwardStep, SlotTerms
from dspark_megatron.training.metrics import MetricSums


class GradientStep:
    """Gradients of a step's loss, and its metrics.

    With `overlap_grad_reduce` Megatron reduces a bucket over data-parallel ranks when the last
    backward pass has filled it. So on each rank the last pass must be one that learns; in a step
    in which a rank has none, all of them reduce afterwards, since collectives must come in one
    order.

    The loss of a step is `sum of weighted terms / divisor` over all micro-batches of all
    data-parallel ranks. The divisor depends on the data alone: it is the sum of the weights, where
    those that come out of the forward pass count as 1, or the number of samples. So it is known
    before the first forward pass and gradients are simply summed. The other forms of
    `loss.normalization` give each micro-batch a divisor of its own, such that summing takes the
    mean of them.
    """

    def __init__(
        self,
        loss: LossConfig,
        model: Any,
        target: StatesSource,
        target_transform: LogitTransform = IDENTITY,
        *,
        tp_group: dist.ProcessGroup,
        dp_group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """model: the data-parallel wrapper of a DSparkDraftModel. target_transform: of the target's
        logits."""
        self.loss, self.model = loss, model
        self.slot_terms: list[SlotTerms] = []
        """Of the last step, by micro-batch that learnt something."""
        self.dp_group, self.device = dp_group, device
        self.forward_step = ForwardStep(
            loss, model.module, target, target_transform, tp_group=tp_group, device=device
        )

    def run(self, batches: list[MicroBatch], metrics: MetricSums) -> None:
        """Leave the step's gradients in the model's buckets, reduced; add to `metrics`."""
        self.model.zero_grad_buffer()
        self.slot_terms = []
        passes = list(zip(batches, self._divisors(batches), strict=True))
        overlap = self.model.ddp_config.overlap_grad_reduce
        if overlap:
            passes.sort(key=lambda one: self.forward_step.learns(one[0]))
            overlap = self._on_every_rank(self.forward_step.learns(passes[-1][0]))
        self.forward_step.expect([batch for batch, _ in passes])
        with self.model.no_sync():
            for one in passes[:-1]:
                self._forward_backward(*one, metrics)
        with contextlib.nullcontext() if overlap else self.model.no_sync():
            self._forward_backward(*passes[-1], metrics)
        self._start_reductions()
        finalize_model_grads([self.model])

    def _on_every_rank(self, flag: bool) -> bool:
        """Whether all data-parallel ranks say so. One all-reduce of one number."""
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.dp_group)
        return bool(tensor.item())

    def _start_reductions(self) -> None:
        """Where Megatron has reductions started by the backward pass, start those of a step that
        did not; Megatron itself starts those of the first."""
        if self.model.ddp_config.overlap_grad_reduce:
            for group in self.model.bucket_groups:
                if group.grad_reduce_handle is None:
                    group.start_grad_sync()

    def _divisors(self, batches: list[MicroBatch]) -> list[Tensor]:
        """[] fp32 for each micro-batch, on the device: nobody waits for them. 0 where there is
        nothing to learn. One all-reduce of a double per micro-batch, none for the local forms."""
        form = self.loss.normalization
        own = [
            len(x.blocks.labels) if form == "local_count" else self.forward_step.divisor(x)
            for x in batches
        ]
        weights = to_device(torch.tensor(own, dtype=torch.float64), self.device)
        if form in ("local", "local_count"):
            weights = weights * self.dp_group.size()
        elif self.dp_group.size() > 1:
            dist.all_reduce(weights, group=self.dp_group)
        if form.startswith("global_"):
            weights = weights.sum().expand(len(own))
        else:
            weights = weights * len(own)
        return list(weights.float().unbind())

    def _forward_backward(self, batch: MicroBatch, divisor: Tensor, metrics: MetricSums) -> None:
        loss = self.forward_step(batch, self.model, metrics)
        if self.forward_step.last is not None:
            self.slot_terms.append(self.forward_step.last)
        if loss is not None:
            (loss / divisor).backward()
