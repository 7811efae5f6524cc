"""Elementwise mathematics of the head loss on one chunk of split logits, in three passes.

    statistics -> (gathered over ranks) combine -> distances -> (summed over ranks) gradient

With u the draft's logits, t the target's, and p, q their softmax over the whole vocabulary
(paper Eq. 4, 8-10):

    CE = lse(u) - u[label]             dCE/du = p - onehot(label)
    L1 = sum |p - q|                   dL1/du = p * (sign(p - q) - sum p * sign(p - q))
    KL = sum q * (log q - log p)       dKL/du = p - q

Every pass reads the logits as the products left them and computes in fp32 (float64 for float64);
only the last one writes: the gradient, over the draft's logits. Between passes that wait for other
ranks p and q are dropped and made anew, which costs less than keeping them; a rank that holds the
whole vocabulary takes all three in one go. Nothing here knows of ranks.

Shapes: c rows, v/tp columns of this rank without padding.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_megatron.config import LossConfig
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

    @classmethod
    def of(cls, loss: LossConfig) -> "Objective":
        return cls(
            ce=loss.ce_loss_alpha,
            l1=loss.l1_weight,
            kl=loss.kl_loss_alpha,
            labels_from_target=loss.ce_labels == "target_argmax",
        )

    @property
    def needs_target_logits(self) -> bool:
        return self.l1 > 0 or self.kl > 0 or self.labels_from_target


Room = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Where a pass may put its p, its q and a third; None: in tensors of its own."""
NO_ROOM: Room = (None, None, None)


def precise(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: fp32, or float64 where the inputs are."""
    return torch.promote_types(dtype, torch.float32)


def statistics(
    draft: Tensor,
    teacher: Tensor | None,
    columns: Tensor,
    mine: Tensor,
    objective: Objective,
    room: Room = NO_ROOM,
) -> Tensor:
    """First pass: what every rank must know of this shard, [3, 5 or 6, c]: the label's logit; the
    draft's maximum and sum of exp(u - maximum); the same of the target; the target's own label.

    columns [c]: of the labels in this shard, where `mine`. Of a label that the target chooses,
    each shard names its best candidate.
    """
    return _statistics(draft, teacher, columns, mine, objective, room)[0]


def _statistics(
    draft: Tensor,
    teacher: Tensor | None,
    columns: Tensor,
    mine: Tensor,
    objective: Objective,
    room: Room,
) -> tuple[Tensor, list[Tensor]]:
    """The statistics, and the exponentials [c, v/tp] that they are sums of."""
    if objective.labels_from_target:
        columns, mine = teacher.argmax(dim=-1), torch.ones_like(mine)
    chosen = draft.gather(1, columns[:, None]).squeeze(1)
    found = [torch.where(mine, chosen, 0).to(precise(draft.dtype))]
    exponentials = []
    for logits, out in zip((draft, teacher), room, strict=False):
        if logits is None:
            break
        maximum = logits.amax(dim=-1).to(found[0].dtype)
        exponentials.append(exp_shifted(logits, maximum, out))
        found += [maximum, exponentials[-1].sum(dim=-1)]
    if objective.labels_from_target:
        found.append(columns.to(found[0].dtype))  # exact: fp32 counts to 2^24
    return torch.stack(found), exponentials


def exp_shifted(logits: Tensor, shift: Tensor, out: Tensor | None) -> Tensor:
    """exp(logits - shift) in the type of the shift; logits [c, v/tp], shift [c]."""
    return torch.sub(logits, shift[:, None], out=out).exp_()


class Combined(NamedTuple):
    """What the statistics of all ranks say, [c] each."""

    ce: Tensor
    draft_lse: Tensor
    target_lse: Tensor | None
    label_shard: Tensor | None
    """Rank that holds the target's label, and the column it has there; None for given labels."""
    label_column: Tensor | None


def combine(shards: Tensor) -> Combined:
    """Statistics [tp, 3, 5 or 6, c] of all ranks -> CE and log-sum-exps, the same everywhere."""
    label_logit, *sums = shards.unbind(dim=1)
    draft_lse = combine_log_sum_exp(*sums[:2])
    target_lse = combine_log_sum_exp(*sums[2:4]) if len(sums) > 2 else None
    if len(sums) < 5:
        ce = draft_lse - label_logit.sum(dim=0)
        return Combined(ce, draft_lse, target_lse, None, None)
    best = sums[2].argmax(dim=0, keepdim=True)  # [1, c]
    ce = draft_lse - label_logit.gather(0, best)[0]
    return Combined(ce, draft_lse, target_lse, best[0], sums[4].gather(0, best)[0].long())


def distances(
    draft: Tensor,
    teacher: Tensor,
    draft_lse: Tensor,
    target_lse: Tensor,
    objective: Objective,
    room: Room = NO_ROOM,
) -> Tensor:
    """Second pass, with a teacher: this shard's parts of L1, of sum p * sign(p - q) (0 without an
    L1 term) and, for KL, of sum q * (t - u), [2 or 3, c]."""
    p, q = exp_shifted(draft, draft_lse, room[0]), exp_shifted(teacher, target_lse, room[1])
    return _distances(draft, teacher, p, q, objective, room)[0]


def _distances(
    draft: Tensor, teacher: Tensor, p: Tensor, q: Tensor, objective: Objective, room: Room
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sums, and what `_slopes` leaves of p and q."""
    cross = []
    if objective.kl > 0:  # in fp32: bf16 logits of some 30 apart differ by steps of 1/8
        cross = [(teacher.to(q.dtype) - draft).mul_(q).sum(dim=-1)]
    difference = q.neg_().add_(p)
    l1 = torch.abs(difference, out=room[2]).sum(dim=-1)
    signed, kept = _slopes(p, difference, objective)
    signed_sum = torch.zeros_like(l1) if signed is None else signed.sum(dim=-1)
    return torch.stack([l1, signed_sum, *cross]), signed, kept


def _slopes(
    p: Tensor, difference: Tensor, objective: Objective
) -> tuple[Tensor | None, Tensor | None]:
    """From p - q, which is overwritten: p * sign(p - q) for the L1 term, p - q for KL; None for a
    term without weight."""
    if objective.l1 == 0:
        return None, difference if objective.kl > 0 else None
    kept = difference.clone() if objective.kl > 0 else None
    return difference.sign_().mul_(p), kept


def gradient(
    draft: Tensor,
    teacher: Tensor | None,
    draft_lse: Tensor,
    target_lse: Tensor | None,
    signed_sum: Tensor | None,
    columns: Tensor,
    mine: Tensor,
    objective: Objective,
    room: Room = NO_ROOM,
) -> None:
    """Third pass: `draft` becomes the gradient of its rows' unweighted losses. signed_sum [c]: sum
    p * sign(p - q) over all shards; columns [c]: of the labels, where `mine`."""
    p, signed, difference = exp_shifted(draft, draft_lse, room[0]), None, None
    if objective.l1 > 0 or objective.kl > 0:
        q = exp_shifted(teacher, target_lse, room[1])
        signed, difference = _slopes(p, q.neg_().add_(p), objective)
    _gradient(draft, p, signed, difference, signed_sum, columns, mine, objective)


def _gradient(
    draft: Tensor,
    p: Tensor,
    signed: Tensor | None,
    difference: Tensor | None,
    signed_sum: Tensor | None,
    columns: Tensor,
    mine: Tensor,
    objective: Objective,
) -> None:
    if signed is not None:
        p.mul_((objective.ce - objective.l1 * signed_sum)[:, None])
        p.add_(signed, alpha=objective.l1)
    else:
        p.mul_(objective.ce)
    if difference is not None:
        p.add_(difference, alpha=objective.kl)
    p.scatter_add_(1, columns[:, None], (-objective.ce * mine.to(p.dtype))[:, None])
    draft.copy_(p)


def all_passes(
    draft: Tensor,
    teacher: Tensor | None,
    columns: Tensor,
    objective: Objective,
    room: Room = NO_ROOM,
) -> Tensor:
    """The three passes on a rank that has the whole vocabulary. `draft` becomes the gradient;
    returns CE, L1 and KL, [3, c], 0 where they are not known."""
    if room[2] is not None and draft.dtype == precise(draft.dtype) and objective.kl == 0:
        room = draft, teacher, room[2]  # nobody needs the logits again
    mine = torch.ones_like(columns, dtype=torch.bool)
    found, exponentials = _statistics(draft, teacher, columns, mine, objective, room)
    row = combine(found[None])
    p = exponentials[0].mul_((found[1] - row.draft_lse).exp()[:, None])
    l1 = kl = torch.zeros_like(row.ce)
    signed = difference = signed_sum = None
    if teacher is not None:
        q = exponentials[1].mul_((found[3] - row.target_lse).exp()[:, None])
        sums, signed, difference = _distances(draft, teacher, p, q, objective, room)
        l1, signed_sum, *cross = sums
        kl = cross[0] - row.target_lse + row.draft_lse if cross else kl
    if row.label_column is not None:
        columns = row.label_column
    _gradient(draft, p, signed, difference, signed_sum, columns, mine, objective)
    return torch.stack([row.ce, l1, kl])
