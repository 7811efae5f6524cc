"""The terms of the head loss and their gradient, from a chunk of split logits.

u are the draft logits (base_logits + markov_bias), t the target logits, and p, q their softmax over
the whole vocabulary (paper Eq. 4). CE = lse(u) - u[label] (Eq. 9) with dCE/du = p - onehot(label);
`objective/distances.py` has the distances of p and q. All need sums over all ranks, so there are
three passes over the logits with a collective of a few floats a slot between them:

    statistics -> (gathered) combine -> distances -> (summed) gradient

Each computes in fp32 (float64 for float64), and only the last one writes: the gradient, over u.
Each makes p and q anew, which costs less than keeping them; a rank that holds the whole vocabulary
needs no collective and takes all passes in one.

Shapes: c slots of the chunk, v/tp columns of this rank without padding.
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.ops.chunk_budget import in_tiles
from dspark_megatron.ops.objective.distances import DISTANCES, Pair
from dspark_megatron.ops.objective.objective import Objective
from dspark_megatron.ops.vocab_parallel import (
    VocabShard,
    all_gather,
    all_reduce,
    combine_log_sum_exp,
)


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
    """The terms of each slot, [terms, c], in the order of `objective.weights`: CE, L1 (0 without a
    target) and others. `draft_logits` becomes the gradient of each slot's unweighted loss."""
    u, t = draft_logits, target_logits
    run = compiled if compile else in_tiles
    columns = shard.local_columns(labels)
    if tp_group.size() == 1:
        in_place = not compile and u.dtype == precise(u.dtype)
        return run(all_passes)(u, t, columns, objective, in_place)
    found = all_gather(run(statistics)(u, t, columns, objective), tp_group=tp_group)
    ce, lse, columns = combine(found, columns, tp_group.rank(), objective)
    sums = ce.new_zeros(objective.num_sums, len(ce))
    if t is not None:
        sums = run(distances)(u, t, lse, objective)
        all_reduce(sums, tp_group=tp_group)
    run(gradient)(u, t, lse, sums.t(), columns, objective)
    return _terms(ce, lse, sums, objective)


@functools.cache
def compiled(function: Callable) -> Callable:
    """Fused by torch.compile, once for the first number of slots and once for all others.
    `fullgraph`: a shape too many is an error, not a silent return to what is not fused."""
    return torch.compile(function, fullgraph=True)


def statistics(u: Tensor, t: Tensor | None, columns: Tensor, objective: Objective) -> Tensor:
    """First pass: what all ranks must know of this shard, [3 to 8, c]: the label's logit; the
    maximum of u and the sum of exp(u - maximum); the same of t; for Renyi's divergence the same of
    (u + t) / 2; the column of the target's label.

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
    overwritten = (x if in_place else None for x in (u, t, None))
    logits = [u] if t is None else [u, t]
    if t is not None and objective.renyi_half > 0:
        logits.append(_halfway(u, t))
    exponentials = []
    for x, out in zip(logits, overwritten, strict=False):
        maximum = x.amax(dim=-1).to(found[0].dtype)
        exponentials.append(exp_shifted(x, maximum, out))
        found += [maximum, exponentials[-1].sum(dim=-1)]
    if objective.labels_from_target:
        found.append(columns.to(found[0].dtype))  # exact: fp32 counts to 2^24
    return torch.stack(found), exponentials


def _halfway(u: Tensor, t: Tensor) -> Tensor:
    """(u + t) / 2, the logits of sqrt(p q)."""
    return u.to(precise(u.dtype)).add(t).mul_(0.5)


def combine(
    shards: Tensor, columns: Tensor, rank: int, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [tp, 3 to 8, c] of all ranks -> CE [c] and the log-sum-exps [c, 1 to 3] of u, t
    and (u + t) / 2, the same everywhere, and the labels' columns in this rank's shard."""
    label_logit, *sums = shards.unbind(dim=1)
    target_columns = sums.pop() if objective.labels_from_target else None
    pairs = zip(sums[::2], sums[1::2], strict=True)
    lse = torch.stack([combine_log_sum_exp(*pair) for pair in pairs], dim=1)
    if target_columns is None:
        return lse[:, 0] - label_logit.sum(dim=0), lse, columns
    best = sums[2].argmax(dim=0, keepdim=True)  # [1, c], rank of the target's label
    label_logit, column = (x.gather(0, best)[0] for x in (label_logit, target_columns))
    return lse[:, 0] - label_logit, lse, torch.where(best[0] == rank, column, -1).long()


def distances(u: Tensor, t: Tensor, lse: Tensor, objective: Objective) -> Tensor:
    """Second pass, with a target: this shard's parts of the objective's sums, [num_sums, c]."""
    return _distances(_pair(u, t, lse, objective), objective, summed=True)[0]


def _pair(u: Tensor, t: Tensor, lse: Tensor, objective: Objective) -> Pair:
    p, q = exp_shifted(u, lse[:, 0]), exp_shifted(t, lse[:, 1])
    return Pair(p, q, objective.keeps_q, _log_ratio(_apart(u, t, objective), lse))


def _apart(u: Tensor, t: Tensor, objective: Objective) -> Tensor | None:
    """u - t where a distance needs it, in fp32: bf16 logits of some 30 apart differ by steps of
    1/8."""
    return u.to(precise(u.dtype)).sub(t) if objective.needs_log_ratio else None


def _log_ratio(apart: Tensor | None, lse: Tensor) -> Tensor | None:
    """log p - log q in place of u - t."""
    return None if apart is None else apart.sub_((lse[:, 0] - lse[:, 1])[:, None])


def _distances(
    pair: Pair, objective: Objective, *, summed: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sums, if they are asked for, and for each distance its slope f or its distribution pi."""
    sums, directions = [], {}
    for name in objective.distances:
        directions[name], parts = DISTANCES[name].of(pair, summed)
        sums += parts
    return torch.stack(sums) if summed else pair.p.new_empty(0), directions


def gradient(
    u: Tensor,
    t: Tensor | None,
    lse: Tensor,
    sums: Tensor,
    columns: Tensor,
    objective: Objective,
) -> None:
    """Third pass: `u` becomes the gradient. sums [c, num_sums]: of the second pass, over all
    shards."""
    if t is None or not objective.compare_with_target:
        _gradient(u, exp_shifted(u, lse[:, 0]), {}, sums.t(), columns, objective)
        return
    halfway = None
    if objective.renyi_half > 0:
        halfway = exp_shifted(_halfway(u, t), lse[:, 2])
    pair = _pair(u, t, lse, objective)
    _, directions = _distances(pair, objective, summed=False)
    _gradient(u, pair.p, directions, sums.t(), columns, objective, halfway)


def _gradient(
    u: Tensor,
    p: Tensor,
    directions: dict[str, Tensor],
    sums: Tensor,
    columns: Tensor,
    objective: Objective,
    halfway: Tensor | None = None,
) -> None:
    """All pulls weigh p by their sum, all tilts by f - sum p f. halfway: what Renyi's divergence
    pulls to."""
    found = objective.by_distance(sums)
    slopes = objective.slopes({name: distance for name, (distance, _) in found.items()})
    factor, tilt = sums.new_full(columns.shape, objective.ce + objective.renyi_half), None
    pulls = [] if halfway is None else [halfway.mul_(objective.renyi_half)]
    for name, direction in directions.items():
        slope = slopes[name]
        if not isinstance(slope, Tensor) and slope == 0:
            continue
        weighted = direction.mul_(slope[:, None] if isinstance(slope, Tensor) else slope)
        if DISTANCES[name].is_pull:
            factor = factor + slope
            pulls.append(weighted)
        else:
            factor = factor - slope * found[name][1]
            tilt = weighted if tilt is None else tilt.add_(weighted)
    p.mul_(factor[:, None] if tilt is None else tilt.add_(factor[:, None]))
    for weighted in pulls:
        p.sub_(weighted)
    onehot = (columns >= 0).to(p.dtype)[:, None]
    p.scatter_add_(1, columns.clamp(min=0)[:, None], -objective.ce * onehot)
    u.copy_(p)


def all_passes(
    u: Tensor, t: Tensor | None, columns: Tensor, objective: Objective, in_place: bool
) -> Tensor:
    """The three passes on a rank that has the whole vocabulary; p and q are made once, in_place
    over the logits. `u` becomes the gradient; returns the terms, [terms, c]."""
    apart = None if t is None else _apart(u, t, objective)
    found, exponentials = _statistics(u, t, columns, objective, in_place)
    ce, lse, columns = combine(found[None], columns, 0, objective)
    maxima = found[1 : 1 + 2 * len(exponentials) : 2].t()
    factors = (maxima - lse).exp().t()
    p, *others = (x.mul_(y[:, None]) for x, y in zip(exponentials, factors, strict=True))
    sums = ce.new_zeros(objective.num_sums, len(ce))
    directions: dict[str, Tensor] = {}
    if t is not None:
        pair = Pair(p, others[0], objective.keeps_q, _log_ratio(apart, lse))
        sums, directions = _distances(pair, objective, summed=True)
    halfway = others[1] if len(others) > 1 else None
    _gradient(u, p, directions, sums, columns, objective, halfway)
    return _terms(ce, lse, sums, objective)


def _terms(ce: Tensor, lse: Tensor, sums: Tensor, objective: Objective) -> Tensor:
    """[terms, c] from the log-sum-exps [c, 1 to 3] and the sums over all shards."""
    found = {name: distance for name, (distance, _) in objective.by_distance(sums).items()}
    if objective.renyi_half > 0:
        found["renyi_half"] = lse[:, 0] + lse[:, 1] - 2 * lse[:, 2]
    return objective.terms(ce, found)


def exp_shifted(logits: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """exp(logits - shift) in the type of the shift; logits [c, v/tp], shift [c]."""
    return torch.sub(logits, shift[:, None], out=out).exp_()


def precise(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: fp32, or float64 where the inputs are."""
    return torch.promote_types(dtype, torch.float32)
