"""Elementwise mathematics of the head loss on one chunk of split logits, in three passes.

    statistics -> (gathered over ranks) combine -> distances -> (summed over ranks) gradient

With u the draft's logits, t the target's, and p, q their softmax over the whole vocabulary
(paper Eq. 4, 8-10):

    CE = lse(u) - u[label]             dCE/du = p - onehot(label)
    L1 = sum |p - q|                   dL1/du = p * (sign(p - q) - sum p * sign(p - q))
    KL = sum q * (log q - log p)       dKL/du = p - q

Every pass reads the logits as the products left them and computes in fp32 (float64 for float64);
only the last one writes: the gradient, over the draft's logits. So p and q are computed anew in
each, which costs less than keeping them. Nothing here knows of ranks.

Shapes: c rows, v/tp columns of this rank without padding.
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


def precise(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: fp32, or float64 where the inputs are."""
    return torch.promote_types(dtype, torch.float32)


def statistics(
    draft: Tensor, teacher: Tensor | None, columns: Tensor, mine: Tensor, objective: Objective
) -> Tensor:
    """First pass: what every rank must know of this shard, [3, 5 or 6, c]: the label's logit; the
    draft's maximum and sum of exp(u - maximum); the same of the target; the target's own label.

    columns [c]: of the labels in this shard, where `mine`. Of a label that the target chooses,
    each shard names its best candidate.
    """
    if objective.labels_from_target:
        columns, mine = teacher.argmax(dim=-1), torch.ones_like(mine)
    chosen = draft.gather(1, columns[:, None]).squeeze(1)
    found = [torch.where(mine, chosen, 0).to(precise(draft.dtype)), *_maximum_and_sum(draft)]
    if teacher is not None:
        found += _maximum_and_sum(teacher)
    if objective.labels_from_target:
        found.append(columns.to(found[0].dtype))  # exact: fp32 counts to 2^24
    return torch.stack(found)


def _maximum_and_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    maximum = logits.amax(dim=-1).to(precise(logits.dtype))
    return maximum, _exp(logits, maximum).sum(dim=-1)


def _exp(logits: Tensor, shift: Tensor) -> Tensor:
    return (logits - shift[:, None]).exp_()


class Combined(NamedTuple):
    """What the statistics of all ranks say, [c] each."""

    ce: Tensor
    draft_lse: Tensor
    teacher_lse: Tensor | None
    label_shard: Tensor | None
    """Rank that holds the target's label, and the column it has there; None for given labels."""
    label_column: Tensor | None


def combine(shards: Tensor) -> Combined:
    """Statistics [tp, 3, 5 or 6, c] of all ranks -> CE and log-sum-exps, the same everywhere."""
    label_logit, *sums = shards.unbind(dim=1)
    draft_lse = combine_log_sum_exp(*sums[:2])
    teacher_lse = combine_log_sum_exp(*sums[2:4]) if len(sums) > 2 else None
    if len(sums) < 5:
        ce = draft_lse - label_logit.sum(dim=0)
        return Combined(ce, draft_lse, teacher_lse, None, None)
    best = sums[2].argmax(dim=0, keepdim=True)  # [1, c]
    ce = draft_lse - label_logit.gather(0, best)[0]
    return Combined(ce, draft_lse, teacher_lse, best[0], sums[4].gather(0, best)[0].long())


def distances(
    draft: Tensor, teacher: Tensor, draft_lse: Tensor, teacher_lse: Tensor, objective: Objective
) -> Tensor:
    """Second pass, with a teacher: this shard's parts of L1, of sum p * sign(p - q) (0 without an
    L1 term) and, for KL, of sum q * (t - u), [2 or 3, c]."""
    p, q = _exp(draft, draft_lse), _exp(teacher, teacher_lse)
    cross = []
    if objective.kl > 0:
        cross = [(teacher - draft).to(q.dtype).mul_(q).sum(dim=-1)]
    difference = torch.sub(p, q, out=q)
    l1 = difference.abs().sum(dim=-1)
    signed = torch.zeros_like(l1)
    if objective.l1 > 0:
        signed = difference.sign_().mul_(p).sum(dim=-1)
    return torch.stack([l1, signed, *cross])


def gradient(
    draft: Tensor,
    teacher: Tensor | None,
    draft_lse: Tensor,
    teacher_lse: Tensor | None,
    signed_sum: Tensor | None,
    columns: Tensor,
    mine: Tensor,
    objective: Objective,
) -> None:
    """Third pass: `draft` becomes the gradient of its rows' unweighted losses. signed_sum [c]: sum
    p * sign(p - q) over all shards; columns [c]: of the labels, where `mine`."""
    p = _exp(draft, draft_lse)
    if objective.l1 > 0 or objective.kl > 0:
        difference = _exp(teacher, teacher_lse).neg_().add_(p)
        by_kl = difference * objective.kl if objective.kl > 0 else None
        signed = difference.sign_().mul_(p)
        p.mul_((objective.ce - objective.l1 * signed_sum)[:, None])
        p.add_(signed, alpha=objective.l1)
        if by_kl is not None:
            p.add_(by_kl)
    else:
        p.mul_(objective.ce)
    p.scatter_add_(1, columns[:, None], (-objective.ce * mine.to(p.dtype))[:, None])
    draft.copy_(p)


class Passes(NamedTuple):
    statistics: Callable[..., Tensor]
    distances: Callable[..., Tensor]
    gradient: Callable[..., None]


@functools.cache
def compiled_passes() -> Passes:
    """The passes, each fused by torch.compile for every shape it meets."""
    return Passes(*(torch.compile(f, dynamic=False) for f in (statistics, distances, gradient)))


@functools.cache
def tiled_passes(tile_rows: int) -> Passes:
    """The passes a few rows at a time: bounds what they allocate, and keeps it in the cache."""
    return Passes(*(_in_tiles(f, tile_rows) for f in (statistics, distances, gradient)))


def _in_tiles(function: Callable, tile_rows: int) -> Callable:
    def run(*arguments: object) -> Tensor | None:
        parts = []
        for start in range(0, len(arguments[0]), tile_rows):
            rows = slice(start, start + tile_rows)
            parts.append(function(*(x[rows] if isinstance(x, Tensor) else x for x in arguments)))
        return None if parts[0] is None else torch.cat(parts, dim=-1)

    return run
