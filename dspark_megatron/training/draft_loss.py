"""The loss of a micro-batch from the draft's output and the target's states, and its metrics.

Shapes: r supervised slots, k slots of a block, h hidden.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dspark_megatron.config import LossConfig
from dspark_megatron.data.blocks import slot_weights
from dspark_megatron.data.device_blocks import DeviceBlocks
from dspark_megatron.model.draft_model import DraftOutput, DSparkDraftModel
from dspark_megatron.ops.acceptance import tau
from dspark_megatron.ops.chunk_budget import chunk_rows
from dspark_megatron.ops.head_loss import HeadLoss, HeadLossOutput, Objective
from dspark_megatron.targets.base import TargetStates
from dspark_megatron.training.metrics import MetricSums


class DraftLoss:
    """Weighted sum of all terms over supervised slots; dividing is the caller's."""

    def __init__(
        self,
        config: LossConfig,
        draft: DSparkDraftModel,
        *,
        tp_group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        has_head = draft.confidence_head is not None
        self.confidence_alpha = config.confidence_head_alpha if has_head else 0.0
        self.with_target = config.needs_target_logits(with_confidence_head=has_head)
        self.slots = slot_weights(draft.shape.block_size, config.loss_decay_gamma)
        self._slots_on_device = self.slots.to(device)
        self.objective = Objective.of(config)
        head = draft.head_weights()
        size = len(head.lm_head), head.lm_head.dtype
        self.head_loss = HeadLoss(
            head,
            self.objective,
            chunk_rows(config, *size, with_target=self.with_target),
            config.compile,
            tp_group=tp_group,
        )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term in use, by its name in the metrics."""
        terms = {"ce": self.objective.ce}
        if self.with_target:
            terms["l1"] = self.objective.l1
        if self.objective.kl > 0:
            terms["kl"] = self.objective.kl
        if self.confidence_alpha > 0:
            terms["confidence"] = self.confidence_alpha
        return terms

    def __call__(
        self, blocks: DeviceBlocks, states: TargetStates, output: DraftOutput, metrics: MetricSums
    ) -> Tensor:
        """[] with gradients; adds to `metrics`. Raises ValueError when a term needs the target's
        last hidden states and there are none."""
        of = blocks.supervised
        weights = self._slots_on_device[blocks.slot_index % len(self.slots)]
        result = self.head_loss(
            of(output.hidden),
            None if output.latents is None else of(output.latents),
            self._target_rows(blocks, states, output.hidden.dtype),
            blocks.labels,
            weights,
        )
        _add_terms(blocks, weights, result, metrics)
        if self.confidence_alpha == 0:
            return result.loss
        logits = of(output.confidence_logits)
        confidence_sum = _confidence(logits, result.accept_rate, weights, metrics)
        return result.loss + self.confidence_alpha * confidence_sum

    def _target_rows(
        self, blocks: DeviceBlocks, states: TargetStates, dtype: torch.dtype
    ) -> Tensor | None:
        """[r, h] states of the target that predict the supervised labels."""
        if not self.with_target:
            return None
        if states.last_hidden is None:
            raise ValueError(
                "the L1, KL and confidence terms compare with the target, but its last hidden "
                "states are missing; provide them, or train with cross entropy alone "
                "(loss.l1_loss_alpha=0 loss.tvd_loss_alpha=0 loss.kl_loss_alpha=0 "
                "loss.ce_labels=data model.enable_confidence_head=false)"
            )
        return blocks.target_of(states.last_hidden).to(dtype)


def _add_terms(
    blocks: DeviceBlocks, weights: Tensor, result: HeadLossOutput, metrics: MetricSums
) -> None:
    metrics.add(weight=weights.sum(), ce_sum=(weights * result.ce).sum())
    if result.kl is not None:
        metrics.add(kl_sum=(weights * result.kl).sum())
    if result.l1 is None:
        return
    accept_rates = blocks.by_slot(result.accept_rate.to(weights.dtype))
    mask = blocks.by_slot(torch.ones_like(blocks.labels, dtype=torch.bool))
    metrics.add(
        l1_sum=(weights * result.l1).sum(),
        accept_sum=accept_rates.sum(dim=0),
        accept_count=mask.sum(dim=0),
        tau_sum=tau(accept_rates, mask).sum(),
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
