"""The fused head loss: cross entropy, L1, KL and accept rate on a split vocabulary.

Slots go through in chunks: two products with the vocabulary make the logits of draft and target,
`logit_terms.py` turns them into the terms and, in place, into their gradient, and two products
carry that back. So no [n, v/tp] tensor outlives its chunk, and the backward pass only scales
gradients that are there. A soft cap of the draft needs more: the product of [h z] falls into two,
with the cap between them, and the capped logits are kept beside the others of their chunk, since
the slope of the cap comes from them. They count in the chunk's budget, so the memory is the same.

Weights by acceptance are known once a whole block's terms are: then a chunk is cut at the end of a
block, and its weights come between its terms and the products that carry its gradient back.

Shapes: n supervised slots, c slots of a chunk, h hidden, r Markov rank, v/tp vocabulary entries of
this rank.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.ops.logit_terms import logit_terms, precise
from dspark_megatron.ops.logit_transform import IDENTITY, LogitFactors, LogitTransform
from dspark_megatron.ops.objective.acceptance_weights import AcceptanceWeights
from dspark_megatron.ops.objective.distances import accept_rate
from dspark_megatron.ops.objective.objective import Objective
from dspark_megatron.ops.vocab_parallel import VocabShard, all_reduce

Weights = Tensor | AcceptanceWeights
"""Of slots [n]: given, or to be found from their terms."""


@dataclass(frozen=True)
class HeadWeights:
    """This rank's rows of the vocabulary matrices."""

    output_weight: Tensor
    """[v/tp, h + r], frozen: the LM head, then columns for a copy of `markov_w2`, so that draft
    logits are one product over [h z]."""
    markov_w2: Tensor | None
    """[v/tp, r], trained; None without a Markov head."""
    shard: VocabShard
    transform: LogitTransform = IDENTITY
    """Of the base logits; the Markov bias is added after it."""

    @property
    def rank(self) -> int:
        return 0 if self.markov_w2 is None else self.markov_w2.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.output_weight.shape[1] - self.rank

    @property
    def lm_head(self) -> Tensor:
        """[v/tp, h]"""
        return self.output_weight[:, : self.hidden_size]

    @torch.no_grad()
    def updated_output_weight(self) -> Tensor:
        """`output_weight` with `markov_w2` as it is now."""
        if self.markov_w2 is not None:
            self.output_weight[:, self.hidden_size :] = self.markov_w2
        return self.output_weight

    def features(self, hidden: Tensor, latent: Tensor | None) -> Tensor:
        """[n, h] and [n, r] -> what `factors` takes, [n, h + r]. A scale without a cap is in it, so
        that draft logits stay one product."""
        if not self.is_capped and self.transform.scale != 1:
            hidden = hidden * self.transform.scale
        return hidden if latent is None else torch.cat([hidden, latent], dim=1)

    def factors(self, features: Tensor) -> LogitFactors:
        """Of draft logits, with `markov_w2` as it is now."""
        transform = self.transform if self.is_capped else IDENTITY
        return LogitFactors(features, self.updated_output_weight(), transform, self.rank)

    @property
    def is_capped(self) -> bool:
        return self.transform.softcapping is not None


@dataclass(frozen=True)
class HeadLossOutput:
    """Results of each slot, fp32. `loss` carries the gradient, the others are detached."""

    loss: Tensor
    """[] `sum_n weights[n] * sum_terms weight * term[n]`."""
    terms: dict[str, Tensor]
    """[n] by their names in `loss.terms`: always `ce`, `l1` where there is target_hidden, and all
    others that the objective weighs."""

    @property
    def accept_rate(self) -> Tensor:
        """[n] chance that the target keeps a draft token, 1 - L1 / 2 (paper Eq. 8). Within some
        1e-6 in fp32."""
        if "l1" not in self.terms:
            raise ValueError("the accept rate needs target_hidden: it compares with the target")
        return accept_rate(self.terms["l1"])


@dataclass(frozen=True)
class HeadLoss:
    """The loss of supervised slots by one head and objective."""

    head: HeadWeights
    objective: Objective
    chunk_rows: int
    """Slots whose logits exist at one time."""
    compile: bool = False
    """Fuse what is done to logits."""
    target_transform: LogitTransform = IDENTITY
    """Of the target's logits."""
    _: KW_ONLY
    tp_group: dist.ProcessGroup

    def __call__(
        self,
        hidden: Tensor,
        latent: Tensor | None,
        target_hidden: Tensor | None,
        labels: Tensor,
        weights: Weights,
    ) -> HeadLossOutput:
        """hidden [n, h]; latent z of the Markov bias [n, r] or None; target_hidden [n, h],
        post-norm, or None when nothing needs the target's distribution; labels [n] int64; weights
        [n] fp32, or by acceptance.

        Gradients reach hidden, latent and head.markov_w2, whole on every rank for hidden and
        latent. Forward, for each slot and rank: an all-gather of 5 floats (3 without target_hidden,
        1 more with labels from the target, 2 more with Renyi's divergence), with target_hidden an
        all-reduce of 2 floats (1 more each with KL or LK-hybrid and with reverse KL, 2 more each
        with JS and with LK-alpha), each one call a chunk; and, in one call, an all-reduce of the
        gradient [n, h + r].
        Backward: none.
        Raises ValueError when the objective needs target_hidden and there is none.
        """
        by_target = isinstance(weights, AcceptanceWeights) and weights.by_target
        if (self.objective.needs_target_logits or by_target) and target_hidden is None:
            raise ValueError(
                "target_hidden is missing: all terms but CE and labels from the target compare "
                "with it; give the target's last hidden states or set these weights to 0"
            )
        features = self.head.features(hidden, latent)
        loss, terms = _Gradients.apply(
            features, self.head.markov_w2, target_hidden, labels, weights, self
        )
        by_name = dict(zip(self.objective.weights, terms, strict=True))
        if target_hidden is None:
            del by_name["l1"]
        return HeadLossOutput(loss, by_name)

    def terms_and_gradients(
        self, features: Tensor, target_hidden: Tensor | None, labels: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """features [n, h + r] -> the objective's terms [terms, n], the weights of the slots [n],
        and the gradients of features and, in fp32, since many chunks add up in it, of markov_w2
        [v/tp, r]."""
        head, real = self.head, self.head.shard.num_real  # padded entries come last, unused
        draft, target = head.factors(features), None
        if target_hidden is not None:
            target = LogitFactors(target_hidden, head.lm_head, self.target_transform)
        chunks = _chunks(weights, self.chunk_rows)
        chunk = max((part.stop - part.start for part, _ in chunks), default=1)
        buffers = 1 + (target is not None) + head.is_capped
        workspace = draft.weight.new_empty(buffers, chunk, real)
        dtype = precise(features.dtype)
        terms = features.new_empty(len(self.objective.weights), len(features), dtype=dtype)
        used = terms.new_empty(len(features))
        grad_features, grad_w2 = torch.empty_like(features), None
        if head.markov_w2 is not None:
            grad_w2 = torch.zeros_like(head.markov_w2, dtype=dtype)
        for part, weight in chunks:
            own = features[part]
            base = workspace[-1, : len(own)] if head.is_capped else None
            out = workspace[0, : len(own)]
            draft_logits = draft.product(part, out, base, compile=self.compile)
            target_logits = None
            if target is not None:
                out = workspace[1, : len(own)]
                target_logits = target.product(part, out, compile=self.compile)
            terms[:, part] = logit_terms(
                draft_logits,
                target_logits,
                labels[part],
                self.objective,
                head.shard,
                compile=self.compile,
                tp_group=self.tp_group,
            )
            if isinstance(weight, AcceptanceWeights):
                weight = weight.of(*terms[:2, part])
            used[part], weight = weight, weight[:, None]
            gradient = draft_logits  # weights go to the narrow side of its products
            self._features_gradient(draft, gradient, base, grad_features[part]).mul_(weight)
            if grad_w2 is not None:
                latents = (own[:, head.hidden_size :] * weight).to(own.dtype)
                _add_product(grad_w2[:real], gradient.t(), latents)
        return terms, used, all_reduce(grad_features, tp_group=self.tp_group), grad_w2

    def _features_gradient(
        self, draft: LogitFactors, gradient: Tensor, base: Tensor | None, out: Tensor
    ) -> Tensor:
        """[c, h + r] in `out` from that of the logits [c, v/tp]. base: the capped logits, which
        become the gradient before the cap."""
        weight, h = draft.weight[: gradient.shape[1]], self.head.hidden_size
        if base is None:
            return torch.mm(gradient, weight, out=out)
        before = draft.transform.pull_back_(base, gradient, compile=self.compile)
        torch.mm(before, weight[:, :h], out=out[:, :h])
        torch.mm(gradient, weight[:, h:], out=out[:, h:])
        return out


def _chunks(weights: Weights, most: int) -> Sequence[tuple[slice, Weights]]:
    """Rows of each chunk, `most` or fewer unless a block has more, and what they weigh."""
    if isinstance(weights, AcceptanceWeights):
        return weights.chunks(most)
    parts = [slice(start, start + most) for start in range(0, len(weights), most)]
    return [(slice(part.start, min(part.stop, len(weights))), weights[part]) for part in parts]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class _Gradients(torch.autograd.Function):
    """The loss and its terms, with the gradients that the forward pass has made."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        w2: Tensor | None,
        target_hidden: Tensor | None,
        labels: Tensor,
        weights: Weights,
        head_loss: Any,
    ) -> tuple[Tensor, Tensor]:
        terms, used, *gradients = head_loss.terms_and_gradients(
            features, target_hidden, labels, weights
        )
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(terms)
        ctx.w2_dtype = None if w2 is None else w2.dtype
        return (used * head_loss.objective.of_slot(terms)).sum(), terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_features, grad_w2 = ctx.saved_tensors
        if grad_w2 is not None:
            grad_w2 = (grad_w2 * grad_loss).to(ctx.w2_dtype)
        return grad_features * grad_loss, grad_w2, None, None, None, None
