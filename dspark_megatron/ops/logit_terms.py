"""Elementwise mathematics of the head loss on one chunk of split logits: three passes.

    statistics -> (gathered over ranks, combine) -> distances -> (added over ranks) -> gradient

Each is whole-tensor work in place and sums over rows: what a shard can say by itself. Nothing here
knows of ranks. With u the draft's logits, t the target's, and p, q their softmax over the whole
vocabulary (paper Eq. 4, 8-10):

    CE = lse(u) - u[label]             dCE/du = p - onehot(label)
    L1 = sum |p - q|                   dL1/du = p * (sign(p - q) - sum p * sign(p - q))
    KL = sum q * (log q - log p)       dKL/du = p - q

Shapes: c rows of a chunk, v/tp columns of this rank.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_megatron.ops.vocab_parallel import combine_log_sum_exp


@dataclass(frozen=True)
class Objective:
    """Weights of a row's terms."""

    ce: float
    l1: float = 0.0
    """Of the raw distance in [0, 2]."""
    kl: float = 0.0
    """Of KL(target || draft)."""
    labels_from_target: bool = False
    """CE with the target's most likely token instead of the given labels."""

    @property
    def needs_teacher(self) -> bool:
        return self.l1 > 0 or self.kl > 0 or self.labels_from_target


@dataclass(frozen=True)
class ChunkLogits:
    """Logits of a chunk, [c, v/tp] each, of which all passes make what they need in place."""

    draft: Tensor
    """u, then exp(u - shift), then p, then the gradient."""
    teacher: Tensor | None
    """t, then exp(t - shift), then p - q, then p * sign(p - q); None without a teacher."""
    kept: Tensor | None
    """t - u, then q; None without KL."""


def statistics(
    logits: ChunkLogits, local_labels: Tensor, mine: Tensor, objective: Objective
) -> dict[str, Tensor]:
    """First pass: logits become exponentials. What every rank must know of this shard, [c] each.

    local_labels: labels as columns of this shard where `mine`; the target's own labels are found
    here if the objective asks for them.
    """
    draft, teacher, kept = logits.draft, logits.teacher, logits.kept
    found = {}
    if objective.labels_from_target:
        local_labels = teacher.argmax(dim=-1)
        found["label"] = local_labels.to(draft.dtype)  # exact: fp32 counts to 2^24
        mine = torch.ones_like(mine)
    chosen = draft.gather(1, local_labels[:, None]).squeeze(1)
    found["label_logit"] = torch.where(mine, chosen, 0)
    if kept is not None:
        # Padding is -inf in both; its difference must not be NaN.
        torch.sub(teacher, draft, out=kept).nan_to_num_(nan=0.0)
    found["draft_shift"], found["draft_sum"] = _exponentials(draft)
    if teacher is not None:
        found["teacher_shift"], found["teacher_sum"] = _exponentials(teacher)
    if kept is not None:
        found["cross"] = kept.mul_(teacher).sum(dim=-1)
    return found


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    # A shard of nothing but padding has only -inf; any finite shift gives its sum of 0.
    shift = logits.amax(dim=-1).clamp(min=torch.finfo(logits.dtype).min)
    logits.sub_(shift[:, None]).exp_()
    return shift, logits.sum(dim=-1)


@dataclass(frozen=True)
class Combined:
    """What the gathered statistics say, [c] each and the same on every rank."""

    ce: Tensor
    kl: Tensor | None
    draft_lse: Tensor
    teacher_lse: Tensor | None
    label_shard: Tensor | None
    """Rank that holds the target's most likely token, and which of its columns it is."""
    label_column: Tensor | None


def combine(shards: dict[str, Tensor]) -> Combined:
    """Statistics [tp, c] of all ranks to CE, KL and the log-sum-exps."""
    draft_lse = combine_log_sum_exp(shards["draft_shift"], shards["draft_sum"])
    teacher_lse = label_shard = label_column = kl = None
    label_logit = shards["label_logit"].sum(dim=0)
    if "teacher_shift" in shards:
        teacher_lse = combine_log_sum_exp(shards["teacher_shift"], shards["teacher_sum"])
    if "label" in shards:
        label_shard = shards["teacher_shift"].argmax(dim=0)
        label_logit, label_column = (
            shards[name].gather(0, label_shard[None])[0] for name in ("label_logit", "label")
        )
        label_column = label_column.long()
    if "cross" in shards:
        part = (shards["teacher_shift"] - teacher_lse).exp()
        kl = (shards["cross"] * part).sum(dim=0) - teacher_lse + draft_lse
    return Combined(draft_lse - label_logit, kl, draft_lse, teacher_lse, label_shard, label_column)


def distances(
    logits: ChunkLogits, draft_scale: Tensor, teacher_scale: Tensor, with_sign: bool
) -> Tensor:
    """Second pass, with a teacher: exponentials times scales [c] become p and p - q, and that
    p * sign(p - q) if wanted. This shard's part of L1 and of sum p * sign(p - q), [2, c]; the
    latter is 0 if not wanted."""
    draft, teacher = logits.draft.mul_(draft_scale[:, None]), logits.teacher
    teacher.mul_(teacher_scale[:, None])
    if logits.kept is not None:
        logits.kept.copy_(teacher)
    torch.sub(draft, teacher, out=teacher)
    l1 = torch.linalg.vector_norm(teacher, ord=1, dim=-1)
    signed = teacher.sign_().mul_(draft).sum(dim=-1) if with_sign else torch.zeros_like(l1)
    return torch.stack([l1, signed])


def gradient(
    logits: ChunkLogits, row_scale: Tensor, labels: Tensor, at_label: Tensor, objective: Objective
) -> None:
    """Third pass: `draft` becomes the gradient of an unweighted row's loss.

    row_scale [c] of the draft's exponentials or of p; at_label [c] is added in column `labels`.
    """
    draft = logits.draft.mul_(row_scale[:, None])
    if objective.l1 > 0:
        draft.add_(logits.teacher, alpha=objective.l1)
    if logits.kept is not None:
        draft.sub_(logits.kept, alpha=objective.kl)
    draft.scatter_add_(1, labels[:, None], at_label[:, None])


class Passes(NamedTuple):
    statistics: Callable[..., dict[str, Tensor]]
    distances: Callable[..., Tensor]
    gradient: Callable[..., None]


PASSES = Passes(statistics, distances, gradient)


@functools.cache
def compiled_passes() -> Passes:
    """The passes, each fused by torch.compile for every shape it meets."""
    return Passes(*(torch.compile(function, dynamic=False) for function in PASSES))
