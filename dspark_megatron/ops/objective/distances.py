"""Distances between the draft's distribution p and the target's q, and their gradients.

With u the draft logits, t the target's, and l = log p - log q, there are two kinds. A tilt weighs
tokens by a slope f, a pull moves p to a distribution:

    tilt: dD/du = p * (f - sum p f)        L1            sum |p - q|               f = sign(p - q)
                                           reverse KL    sum p l                   f = l
                                           JS            sum (p f + q (f - l/2))   f = log(2p / (p + q)) / 2
    pull: dD/du = p - pi                   KL            -sum q l                  pi = q
                                           Renyi-1/2     -2 log sum sqrt(p q)      pi = softmax((u + t) / 2)

Nothing divides by p or q or takes their logarithm, so tokens whose p or q underflows add 0. The
LK terms are functions of L1 and KL: a factor for each slot on the gradients of these.

Shapes: c slots of a chunk, v/tp columns of this rank without padding.
"""  # noqa: E501

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACCEPT_RATE_FLOOR = 1e-5
"""Of LK-alpha: below it the loss is constant."""
HYBRID_DECAY = 3.0
"""Of LK-hybrid: how fast KL gives way to L1 as the accept rate grows."""


class Pair(NamedTuple):
    """The two distributions in this shard, [c, v/tp] each."""

    p: Tensor
    q: Tensor
    """Its memory may be that of the difference, where no distance reads it."""
    difference: Tensor
    """p - q; becomes its sign."""
    log_ratio: Tensor | None
    """log p - log q, where a distance needs it: from logits, in fp32."""

    @property
    def known_log_ratio(self) -> Tensor:
        assert self.log_ratio is not None, "a distance needs it without saying so"
        return self.log_ratio


class Distance(NamedTuple):
    """Of a pair: what `of` gives is the slope f or the distribution pi and, if they are asked for,
    this shard's parts of the sums [c] that all shards add: the distance, and as the last one
    sum p f."""

    of: Callable[[Pair, bool], tuple[Tensor, list[Tensor]]]
    num_sums: int
    is_pull: bool = False
    needs_log_ratio: bool = True


def _l1(pair: Pair, summed: bool) -> tuple[Tensor, list[Tensor]]:
    distance = [pair.difference.abs().sum(dim=-1)] if summed else []
    sign = pair.difference.sign_()
    return sign, [*distance, _mean(sign, pair.p)] if summed else []


def _reverse_kl(pair: Pair, summed: bool) -> tuple[Tensor, list[Tensor]]:
    ratio = pair.known_log_ratio
    return ratio, [_mean(ratio, pair.p)] if summed else []


def _js(pair: Pair, summed: bool) -> tuple[Tensor, list[Tensor]]:
    ratio = pair.known_log_ratio
    slope = F.logsigmoid(ratio).add_(math.log(2)).mul_(0.5)
    if not summed:
        return slope, []
    mean = _mean(slope, pair.p)
    return slope, [mean + _mean(slope.sub(ratio, alpha=0.5), pair.q), mean]


def _kl(pair: Pair, summed: bool) -> tuple[Tensor, list[Tensor]]:
    return pair.q, [-_mean(pair.known_log_ratio, pair.q)] if summed else []


def _mean(values: Tensor, distribution: Tensor) -> Tensor:
    """This shard's part of it, [c]."""
    return (values * distribution).sum(dim=-1)


DISTANCES = {
    "l1": Distance(_l1, 2, needs_log_ratio=False),
    "kl": Distance(_kl, 1, is_pull=True),
    "reverse_kl": Distance(_reverse_kl, 1),
    "js": Distance(_js, 2),
}
"""All but Renyi's, whose sum belongs to the first pass: its shift is a maximum of its own."""


def lk_alpha(distances: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss [c], and its slopes along the distances that it is made of."""
    rate = accept_rate(distances["l1"])
    clamped = rate.clamp(min=ACCEPT_RATE_FLOOR)
    return -clamped.log(), {"l1": torch.where(rate < ACCEPT_RATE_FLOOR, 0, 0.5 / clamped)}


def lk_hybrid(distances: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss [c], and its slopes; the mixing factor is a constant in them."""
    mixing = (-HYBRID_DECAY * accept_rate(distances["l1"])).exp()
    slopes = {"kl": mixing, "l1": (1 - mixing) / 2}
    return slopes["kl"] * distances["kl"] + slopes["l1"] * distances["l1"], slopes


COMPOSED = {"lk_alpha": (lk_alpha, ("l1",)), "lk_hybrid": (lk_hybrid, ("l1", "kl"))}
"""Terms that are functions of distances, and which."""


def accept_rate(l1: Tensor) -> Tensor:
    """Chance that the target keeps a draft token, 1 - L1 / 2 = sum min(p, q) (paper Eq. 8)."""
    return (1 - l1 / 2).clamp(0, 1)
