"""The loss of a micro-batch from the draft's output and the target's states, and its metrics."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dspark_megatron.config import LossConfig
from dspark_megatron.model.draft_model import DraftOutput, DSparkDraftModel
from dspark_megatron.ops.acceptance import tau
from dspark_megatron.ops.anchors import DraftBlocks, slot_weights
from dspark_megatron.ops.chunk_budget import chunk_rows
from dspark_megatron.ops.head_loss import HeadLossOutput, head_loss
from dspark_megatron.ops.logit_terms import Objective
from dspark_megatron.targets.base import TargetStates
from dspark_megatron.training.metrics import MetricSums


class SupervisedRows:
    """The slots to learn, as rows: found on the CPU, where the blocks are, since a GPU would have
    to be waited for to count them."""

    def __init__(self, blocks: DraftBlocks, slots: Tensor, device: torch.device) -> None:
        """slots [k]: weight of each."""
        mask = blocks.eval_mask
        self.mask = mask.to(device)
        """[blocks, k] bool"""
        self.index = mask.flatten().nonzero().squeeze(1).to(device)
        """[n] of the flattened [blocks * k] slots"""
        self.weights = slots.expand(mask.shape)[mask].to(device)
        """[n]"""

    def of(self, by_slot: Tensor) -> Tensor:
        """[blocks, k, ...] -> [n, ...]"""
        return by_slot.flatten(0, 1).index_select(0, self.index)


class DraftLoss:
    """Weighted sum of all terms over supervised rows; dividing is the caller's."""

    def __init__(
        self,
        config: LossConfig,
        draft: DSparkDraftModel,
        *,
        tp_group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self.draft, self.tp_group, self.device = draft, tp_group, device
        has_head = draft.confidence_head is not None
        self.confidence_alpha = config.confidence_head_alpha if has_head else 0.0
        self.with_teacher = config.needs_teacher(with_confidence_head=has_head)
        self.slots = slot_weights(draft.shape.block_size, config.loss_decay_gamma)
        self.compile = config.compile
        self.objective = Objective.of(config)
        joint = draft.head_weights().joint
        self.chunk_rows = chunk_rows(
            config, len(joint), joint.dtype, with_teacher=self.with_teacher
        )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term in use, by its name in the metrics."""
        terms = {"ce": self.objective.ce}
        if self.with_teacher:
            terms["l1"] = self.objective.l1
        if self.objective.kl > 0:
            terms["kl"] = self.objective.kl
        if self.confidence_alpha > 0:
            terms["confidence"] = self.confidence_alpha
        return terms

    def __call__(
        self, blocks: DraftBlocks, states: TargetStates, output: DraftOutput, metrics: MetricSums
    ) -> Tensor:
        """[] with gradients; adds to `metrics`. Raises ValueError when a term needs the target's
        last hidden states and there are none."""
        rows = SupervisedRows(blocks, self.slots, self.device)
        result = head_loss(
            rows.of(output.hidden),
            None if output.latents is None else rows.of(output.latents),
            self._teacher_rows(blocks, states, output.hidden.dtype),
            blocks.labels[blocks.eval_mask].to(self.device),
            rows.weights,
            self.draft.head_weights(),
            self.objective,
            chunk_rows=self.chunk_rows,
            compile=self.compile,
            tp_group=self.tp_group,
        )
        self._add_terms(rows, result, metrics)
        if self.confidence_alpha == 0:
            return result.loss
        logits = rows.of(output.confidence_logits)
        confidence_sum = _confidence(logits, result.accept_rate, rows.weights, metrics)
        return result.loss + self.confidence_alpha * confidence_sum

    def _teacher_rows(
        self, blocks: DraftBlocks, states: TargetStates, dtype: torch.dtype
    ) -> Tensor | None:
        """[n, h] states of the target that predict the supervised labels."""
        if not self.with_teacher:
            return None
        if states.last_hidden is None:
            raise ValueError(
                "the L1, KL and confidence terms compare with the target, but its last hidden "
                "states are missing; provide them, or train with cross entropy alone "
                "(loss.l1_loss_alpha=0 loss.tvd_loss_alpha=0 loss.kl_loss_alpha=0 "
                "loss.ce_labels=data model.enable_confidence_head=false)"
            )
        index = blocks.teacher_index(states.last_hidden.shape[1])[blocks.eval_mask]
        return states.last_hidden.flatten(0, 1)[index.to(self.device)].to(dtype)

    def _add_terms(self, rows: SupervisedRows, result: HeadLossOutput, metrics: MetricSums) -> None:
        weights = rows.weights
        metrics.add(weight=weights.sum(), ce_sum=(weights * result.ce).sum())
        if result.kl is not None:
            metrics.add(kl_sum=(weights * result.kl).sum())
        if result.l1 is None:
            return
        by_slot = torch.zeros(rows.mask.shape, device=self.device)
        by_slot.view(-1).index_copy_(0, rows.index, result.accept_rate.to(by_slot.dtype))
        metrics.add(
            l1_sum=(weights * result.l1).sum(),
            accept_sum=by_slot.sum(dim=0),
            accept_count=rows.mask.sum(dim=0),
            tau_sum=tau(by_slot, rows.mask).sum(),
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
