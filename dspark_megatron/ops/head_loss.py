"""The fused head loss: cross entropy, L1, KL and accept rate on a split vocabulary.

Only this file multiplies hidden states with the vocabulary. Rows go through in chunks; a chunk's
forward also makes its gradients, so no [rows, v/tp] tensor outlives its chunk and the backward pass
only scales what is there. `logit_terms.py` has the formulas.

Shapes: n rows (supervised slots only), c rows of a chunk, h hidden, r Markov rank, v/tp columns of
this rank.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.ops.head_loss_chunks import ChunkRun, HeadWeights
from dspark_megatron.ops.logit_terms import Objective


@dataclass(frozen=True)
class HeadLossOutput:
    """Per-row results, fp32. `loss` carries the gradient, the others are detached."""

    loss: Tensor
    """[] `sum_n weights[n] * (ce * CE[n] + l1 * L1[n] + kl * KL[n])`."""
    ce: Tensor
    """[n] cross entropy in nats."""
    l1: Tensor | None
    """[n] raw L1 distance in [0, 2]; None without a teacher."""
    kl: Tensor | None
    """[n] KL(target || draft) in nats; None unless the objective weighs it."""

    @property
    def accept_rate(self) -> Tensor:
        """[n] chance that the target keeps a draft token, 1 - L1 / 2 (paper Eq. 8)."""
        if self.l1 is None:
            raise ValueError("the accept rate needs target_hidden: it compares with the target")
        return (1 - self.l1 / 2).clamp(0, 1)


def head_loss(
    hidden: Tensor,
    latent: Tensor | None,
    target_hidden: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    head: HeadWeights,
    objective: Objective,
    *,
    chunk_rows: int,
    compile: bool = False,
    tp_group: dist.ProcessGroup,
) -> HeadLossOutput:
    """hidden [n, h]; latent z of the Markov bias [n, r] or None; target_hidden [n, h], post-norm,
    or None when nothing needs the target's distribution; labels [n] int64; weights [n] fp32.
    chunk_rows: rows whose logits exist at one time, of the two chunks under way where there is more
    than one rank.

    Gradients reach hidden, latent and head.markov_w2, whole on every rank for hidden and latent.
    Forward, for each row and rank: an all-gather of 5 floats (3 without a teacher, 6 with labels
    from it), with a teacher an all-reduce of 2 floats (3 with KL), and an all-reduce of the
    gradient [h + r]; each is one call a chunk. Backward: none.
    Raises ValueError when the objective needs a teacher and there is none.
    """
    if objective.needs_target_logits and target_hidden is None:
        raise ValueError(
            "target_hidden is missing: the L1 and KL terms and labels from the target compare "
            "with it; give the target's last hidden states or set these weights to 0"
        )
    features = hidden if latent is None else torch.cat([hidden, latent], dim=1)
    run = ChunkRun(
        features.detach(),
        target_hidden,
        labels,
        weights,
        head,
        objective,
        chunk_rows=chunk_rows,
        compile=compile,
        tp_group=tp_group,
    )
    loss = _HeadLoss.apply(features, head.markov_w2, run)
    return HeadLossOutput(loss, *run.results())


class _HeadLoss(torch.autograd.Function):
    """The run's loss, with the gradients that the run has made."""

    @staticmethod
    def forward(ctx, features, w2, run):
        run.all_chunks()
        ctx.save_for_backward(run.grad_features, run.grad_w2)
        ctx.w2_dtype = None if w2 is None else w2.dtype
        return run.loss()

    @staticmethod
    def backward(ctx, grad_loss):
        grad_features, grad_w2 = ctx.saved_tensors
        if grad_w2 is not None:
            grad_w2 = (grad_w2 * grad_loss).to(ctx.w2_dtype)
        return grad_features * grad_loss, grad_w2, None
