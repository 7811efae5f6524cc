"""The fused head loss: cross entropy, L1 and accept rate on a split vocabulary, chunk by chunk.

Only this file multiplies hidden states with the vocabulary. Rows go through in chunks; a chunk's
forward also makes its gradients, so no [rows, v/tp] tensor outlives its chunk and the backward pass
only scales what is there. With u the draft's logits and t the target's (paper Eq. 4, 8-10):

    p = softmax(u),  q = softmax(t),  CE = lse(u) - u[label],  L1 = sum |p - q|,
    dCE/du = p - onehot(label),       dL1/du = p * (sign(p - q) - sum p * sign(p - q)).

Shapes: n rows (supervised slots only), h hidden, r Markov rank, v/tp columns of this rank.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.ops.vocab_parallel import VocabShard, all_reduce_sum, log_sum_exp


@dataclass(frozen=True)
class HeadWeights:
    """This rank's rows of the vocabulary matrices."""

    lm_head: Tensor
    """[v/tp, h], frozen: it takes no gradient."""
    markov_w2: Tensor | None
    """[v/tp, r], trained; None without a Markov head."""
    shard: VocabShard


@dataclass(frozen=True)
class HeadLossOutput:
    """Per-row results, fp32. `loss` carries the gradient, the others are detached."""

    loss: Tensor
    """[] weighted sum `sum_n weights[n] * (ce_alpha * CE[n] + l1_alpha * L1[n])`."""
    ce: Tensor
    """[n] cross entropy in nats."""
    l1: Tensor
    """[n] raw L1 distance in [0, 2]; zeros without a teacher."""

    @property
    def accept_rate(self) -> Tensor:
        """[n] chance that the target keeps a draft token, 1 - L1 / 2 (paper Eq. 8)."""
        return (1 - self.l1 / 2).clamp(0, 1)


def head_loss(
    hidden: Tensor,
    latent: Tensor | None,
    teacher_hidden: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    head: HeadWeights,
    *,
    ce_alpha: float,
    l1_alpha: float,
    chunk_rows: int,
    tp_group: dist.ProcessGroup,
) -> HeadLossOutput:
    """hidden [n, h]; latent z of the Markov bias [n, r] or None; teacher_hidden [n, h], post-norm,
    or None when nothing needs the target's distribution; labels [n] int64; weights [n] fp32.

    Gradients reach hidden, latent and head.markov_w2, whole on every rank for hidden and latent.
    Forward: per chunk one all-gather of 4 floats and one all-reduce of 3 floats a row and rank,
    then one all-reduce of the gradients [n, h + r]. Backward: none.
    Raises ValueError when l1_alpha > 0 and there is no teacher.
    """
    if l1_alpha > 0 and teacher_hidden is None:
        raise ValueError("l1_alpha > 0 needs teacher_hidden: the L1 term compares with the target")
    loss, ce, l1 = _HeadLoss.apply(
        hidden,
        latent,
        head.markov_w2,
        head.lm_head,
        teacher_hidden,
        labels,
        weights,
        head.shard,
        (ce_alpha, l1_alpha),
        chunk_rows,
        tp_group,
    )
    return HeadLossOutput(loss, ce, l1)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, latent, w2, lm_head, teacher_hidden, labels, weights, shard, alphas,
        chunk_rows, tp_group,
    ):  # fmt: skip
        rows = hidden.shape[0]
        ce = hidden.new_zeros(rows, dtype=torch.float32)
        l1 = torch.zeros_like(ce)
        grad_hidden = torch.empty_like(hidden)
        grad_latent = None if latent is None else torch.empty_like(latent)
        # fp32: many chunks add up in it
        grad_w2 = None if latent is None else torch.zeros_like(w2, dtype=torch.float32)
        for start in range(0, rows, chunk_rows):
            part = slice(start, start + chunk_rows)
            logits = hidden[part] @ lm_head.t()  # [c, v/tp]
            if latent is not None:
                logits.addmm_(latent[part], w2.t())
            teacher = None if teacher_hidden is None else teacher_hidden[part] @ lm_head.t()
            ce[part], l1[part], grad = _chunk(
                logits, teacher, labels[part], weights[part], shard, alphas, tp_group
            )
            del logits, teacher
            grad = grad.to(hidden.dtype)
            grad_hidden[part] = grad @ lm_head
            if latent is not None:
                grad_latent[part] = grad @ w2
                grad_w2 += grad.t() @ latent[part]
        _sum_over_shards(grad_hidden, grad_latent, tp_group)
        ctx.save_for_backward(grad_hidden, grad_latent, grad_w2)
        ctx.w2_dtype = None if w2 is None else w2.dtype
        ctx.mark_non_differentiable(ce, l1)
        loss = (weights * (alphas[0] * ce + alphas[1] * l1)).sum()
        return loss, ce, l1

    @staticmethod
    def backward(ctx, grad_loss, _grad_ce, _grad_l1):
        grad_hidden, grad_latent, grad_w2 = ctx.saved_tensors
        if grad_latent is None:
            return (grad_hidden * grad_loss,) + (None,) * 10
        scaled = grad_hidden * grad_loss, grad_latent * grad_loss
        return (*scaled, (grad_w2 * grad_loss).to(ctx.w2_dtype)) + (None,) * 8


def _chunk(logits, teacher, labels, weights, shard, alphas, tp_group):
    """CE and L1 of a chunk and the weighted gradient of its draft logits, [c], [c], [c, v/tp].

    Works in place on logits and teacher, which the caller gives away: three [c, v/tp] tensors of
    fp32 at most, two without a teacher.
    """
    both = [logits.float()] if teacher is None else [logits.float(), teacher.float()]
    del logits, teacher
    for x in both:
        shard.mask_padding_(x)
    local, mine = shard.local_ids(labels)
    terms = [torch.where(mine, both[0].gather(1, local[:, None]).squeeze(1), 0)]
    maxima = torch.stack([x.amax(dim=-1) for x in both])
    # A shard of nothing but padding has only -inf; any finite shift gives its sum of 0.
    shifts = maxima.clamp(min=torch.finfo(torch.float32).min)
    for x, shift in zip(both, shifts, strict=True):
        x.sub_(shift[:, None]).exp_()
    sums = torch.stack([x.sum(dim=-1) for x in both])
    lse = log_sum_exp(maxima, sums, tp_group=tp_group)
    for x, shift, total in zip(both, shifts, lse, strict=True):
        x *= (shift - total).exp()[:, None]
    p = both[0]
    if len(both) == 2:
        difference = both[1].neg_().add_(p)
        sign = difference.sign()
        terms += [_row_dot(difference, sign), _row_dot(p, sign)]
    terms = all_reduce_sum(torch.stack(terms), tp_group=tp_group)
    ce = lse[0] - terms[0]
    l1 = terms[1] if len(both) == 2 else torch.zeros_like(ce)
    ce_weight, l1_weight = weights * alphas[0], weights * alphas[1]
    if alphas[1] > 0:
        factor = sign.sub_(terms[2][:, None]).mul_(l1_weight[:, None]).add_(ce_weight[:, None])
        grad = p.mul_(factor)
    else:
        grad = p.mul_(ce_weight[:, None])
    grad.scatter_add_(1, local[:, None], torch.where(mine, -ce_weight, 0)[:, None])
    return ce, l1, grad


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums of products of rows, [c, v] x [c, v] -> [c], without a tensor of the products."""
    return torch.einsum("cv,cv->c", a, b)


def _sum_over_shards(grad_hidden: Tensor, grad_latent: Tensor | None, tp_group) -> None:
    """Add up the shards' gradients in place: one all-reduce of [n, h + r]."""
    if tp_group.size() == 1:
        return
    parts = [grad_hidden] if grad_latent is None else [grad_hidden, grad_latent]
    packed = all_reduce_sum(torch.cat(parts, dim=1), tp_group=tp_group)
    for part, total in zip(parts, packed.split([x.shape[1] for x in parts], dim=1), strict=True):
        part.copy_(total)
