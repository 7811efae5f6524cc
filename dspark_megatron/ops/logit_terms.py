"""The terms of the head loss and their gradient, from a chunk of split logits.

With u the draft logits (base_logits + markov_bias), t the target logits, and p, q their softmax
over the whole vocabulary (paper Eq. 4):

    CE = lse(u) - u[label]             (Eq. 9)     dCE/du = p - onehot(label)
    L1 = sum |p - q|                   (Eq. 10)    dL1/du = p * (sign(p - q) - sum p * sign(p - q))
    KL = sum q * (log q - log p)                   dKL/du = p - q

p and q need sums over all ranks, and the gradient of L1 one more. So there are three passes over
the logits with a collective of a few floats a slot between them:

    statistics -> (gathered) combine -> distances -> (summed) gradient

Each computes in fp32 (float64 for float64), and only the last one writes: the gradient, over u.
Each makes p and q anew, which costs less than keeping them; a rank that holds the whole vocabulary
needs no collective and takes all passes in one.

Shapes: c slots of the chunk, v/tp columns of this rank without padding.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.config import LossConfig
from dspark_megatron.ops.chunk_budget import in_tiles
from dspark_megatron.ops.vocab_parallel import (
    VocabShard,
    all_gather,
    all_reduce,
    combine_log_sum_exp,
)


@dataclass(frozen=True)
class Objective:
    """Weights of a slot's terms, by their names in `loss.terms`."""

    ce: float = 0.0
    l1: float = 0.0
    """Of the raw distance in [0, 2]."""
    kl: float = 0.0
    """Of KL(target || draft)."""
    labels_from_target: bool = False
    """CE with the target's most likely token instead of the given labels."""

    @classmethod
    def of(cls, loss: LossConfig) -> "Objective":
        return cls(
            ce=loss.terms.ce,
            l1=loss.terms.l1,
            kl=loss.terms.kl,
            labels_from_target=loss.ce_labels == "target_argmax",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the terms that are computed, in their order: CE and L1, then all others that weigh
        anything."""
        return ("ce", "l1", *(("kl",) if self.kl > 0 else ()))

    def of_slot(self, terms: Tensor) -> Tensor:
        """[terms, n], as `names` has them -> the weighted sum of each slot, [n]."""
        weights = [getattr(self, name) for name in self.names]
        return sum(weight * term for weight, term in zip(weights, terms, strict=True))

    @property
    def needs_target_logits(self) -> bool:
        return self.l1 > 0 or self.kl > 0 or self.labels_from_target


def logit_terms(
    draft_logits: Tensor,
    target_logits: Tensor | None,
    labels: Tensor,
    objective: Objective,
    shard: VocabShard,
    *,
    compile: bool,
    tp_group: dist.ProcessGroup,
) -> Tensor:
    """The terms of each slot, [terms, c], in the order of `objective.names`; L1 is 0 without a
    target. `draft_logits` becomes the gradient of each slot's unweighted loss."""
    u, t = draft_logits, target_logits
    run = compiled if compile else in_tiles
    columns = shard.local_columns(labels)
    if tp_group.size() == 1:
        in_place = not compile and objective.kl == 0 and u.dtype == precise(u.dtype)
        return run(all_passes)(u, t, columns, objective, in_place)
    found = all_gather(run(statistics)(u, t, columns, objective), tp_group=tp_group)
    ce, draft_lse, target_lse, columns = combine(found, columns, tp_group.rank())
    sums = ce.new_zeros(2, len(ce))
    if t is not None:
        sums = run(distances)(u, t, draft_lse, target_lse, objective)
        all_reduce(sums, tp_group=tp_group)
    run(gradient)(u, t, draft_lse, target_lse, sums[1], columns, objective)
    return _terms(ce, sums, draft_lse, target_lse)


@functools.cache
def compiled(function: Callable) -> Callable:
    """Fused by torch.compile, once for the first number of slots and once for all others.
    `fullgraph`: a shape too many is an error, not a silent return to what is not fused."""
    return torch.compile(function, fullgraph=True)


def statistics(u: Tensor, t: Tensor | None, columns: Tensor, objective: Objective) -> Tensor:
    """First pass: what all ranks must know of this shard, [3, 5 or 6, c]: the label's logit; the
    maximum of u and the sum of exp(u - maximum); the same of t; the column of the target's label.

    columns [c]: of the labels in this shard, -1 for those of others. Of a label that the target
    chooses, each shard names its best candidate.
    """
    return _statistics(u, t, columns, objective)[0]


def _statistics(
    u: Tensor, t: Tensor | None, columns: Tensor, objective: Objective, in_place: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The statistics, and the exponentials [c, v/tp] that they are sums of."""
    if objective.labels_from_target and t is not None:
        columns = t.argmax(dim=-1)
    label_logit = u.gather(1, columns.clamp(min=0)[:, None]).squeeze(1)
    found = [torch.where(columns < 0, 0, label_logit).to(precise(u.dtype))]
    exponentials = []
    for logits in (u,) if t is None else (u, t):
        maximum = logits.amax(dim=-1).to(found[0].dtype)
        exponentials.append(exp_shifted(logits, maximum, logits if in_place else None))
        found += [maximum, exponentials[-1].sum(dim=-1)]
    if objective.labels_from_target:
        found.append(columns.to(found[0].dtype))  # exact: fp32 counts to 2^24
    return torch.stack(found), exponentials


def combine(shards: Tensor, columns: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics [tp, 3, 5 or 6, c] of all ranks -> CE and the log-sum-exps of u and t (u again
    without t), the same everywhere, and the labels' columns in this rank's shard."""
    label_logit, *sums = shards.unbind(dim=1)
    draft_lse = combine_log_sum_exp(*sums[:2])
    target_lse = combine_log_sum_exp(*sums[2:4]) if len(sums) > 2 else draft_lse
    if len(sums) < 5:
        return draft_lse - label_logit.sum(dim=0), draft_lse, target_lse, columns
    best = sums[2].argmax(dim=0, keepdim=True)  # [1, c], rank of the target's label
    label_logit, column = (x.gather(0, best)[0] for x in (label_logit, sums[4]))
    columns = torch.where(best[0] == rank, column, -1).long()
    return draft_lse - label_logit, draft_lse, target_lse, columns


def distances(
    u: Tensor, t: Tensor, draft_lse: Tensor, target_lse: Tensor, objective: Objective
) -> Tensor:
    """Second pass, with a target: this shard's parts of L1, of sum p * sign(p - q) and, for KL, of
    sum q * (t - u), [2 or 3, c]."""
    return _distances(u, t, exp_shifted(u, draft_lse), exp_shifted(t, target_lse), objective)[0]


Slopes = tuple[Tensor, Tensor | None]
"""p * sign(p - q) for L1, and p - q for KL or None."""


def _distances(
    u: Tensor, t: Tensor, p: Tensor, q: Tensor, objective: Objective
) -> tuple[Tensor, Slopes]:
    """The sums, and the slopes, which take the place of q."""
    cross = []
    if objective.kl > 0:  # in fp32: bf16 logits of some 30 apart differ by steps of 1/8
        cross = [(t.to(q.dtype) - u).mul_(q).sum(dim=-1)]
    difference = q.neg_().add_(p)
    l1 = difference.abs().sum(dim=-1)
    slopes = _slopes(p, difference, objective)
    return torch.stack([l1, slopes[0].sum(dim=-1), *cross]), slopes


def _slopes(p: Tensor, difference: Tensor, objective: Objective) -> Slopes:
    """difference: p - q, which is overwritten."""
    kept = difference.clone() if objective.kl > 0 else None
    return difference.sign_().mul_(p), kept


def gradient(
    u: Tensor,
    t: Tensor | None,
    draft_lse: Tensor,
    target_lse: Tensor,
    signed_sum: Tensor,
    columns: Tensor,
    objective: Objective,
) -> None:
    """Third pass: `u` becomes the gradient. signed_sum [c]: sum p * sign(p - q) over all shards."""
    p, slopes = exp_shifted(u, draft_lse), None
    if t is not None and objective.l1 + objective.kl > 0:
        q = exp_shifted(t, target_lse)
        slopes = _slopes(p, q.neg_().add_(p), objective)
    _gradient(u, p, slopes, signed_sum, columns, objective)


def _gradient(
    u: Tensor,
    p: Tensor,
    slopes: Slopes | None,
    signed_sum: Tensor,
    columns: Tensor,
    objective: Objective,
) -> None:
    p.mul_((objective.ce - objective.l1 * signed_sum)[:, None])
    if slopes is not None:
        signed, difference = slopes
        p.add_(signed, alpha=objective.l1)
        if difference is not None:
            p.add_(difference, alpha=objective.kl)
    onehot = (columns >= 0).to(p.dtype)[:, None]
    p.scatter_add_(1, columns.clamp(min=0)[:, None], -objective.ce * onehot)
    u.copy_(p)


def all_passes(
    u: Tensor, t: Tensor | None, columns: Tensor, objective: Objective, in_place: bool
) -> Tensor:
    """The three passes on a rank that has the whole vocabulary; p and q are made once, in_place
    over the logits. `u` becomes the gradient; returns the terms, [terms, c]."""
    found, exponentials = _statistics(u, t, columns, objective, in_place)
    ce, draft_lse, target_lse, columns = combine(found[None], columns, rank=0)
    p = exponentials[0].mul_((found[1] - draft_lse).exp()[:, None])
    sums, slopes = ce.new_zeros(2, len(ce)), None
    if t is not None:
        q = exponentials[1].mul_((found[3] - target_lse).exp()[:, None])
        sums, slopes = _distances(u, t, p, q, objective)
    _gradient(u, p, slopes, sums[1], columns, objective)
    return _terms(ce, sums, draft_lse, target_lse)


def _terms(ce: Tensor, sums: Tensor, draft_lse: Tensor, target_lse: Tensor) -> Tensor:
    """The terms from the sums of the second pass over all ranks."""
    l1, _, *cross = sums
    return torch.stack([ce, l1, *(x - target_lse + draft_lse for x in cross)])


def exp_shifted(logits: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """exp(logits - shift) in the type of the shift; logits [c, v/tp], shift [c]."""
    return torch.sub(logits, shift[:, None], out=out).exp_()


def precise(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: fp32, or float64 where the inputs are."""
    return torch.promote_types(dtype, torch.float32)
