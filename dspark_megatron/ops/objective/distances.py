"""Distances between the draft's distribution p and the target's q, and their gradients.

With u the draft logits, t the target's, and l = log p - log q, there are two kinds. A tilt weighs
tokens by a slope f, a pull moves p to a distribution:

    tilt: dD/du = p * (f - sum p f)        L1            sum |p - q|               f = sign(p - q)
                                           reverse KL    sum p l                   f = l
                                           JS            sum (p f + q g)           f = log(p / m) / 2
                                           overlap       sum min(p, q)             f = 1 where p < q
    pull: dD/du = p - pi                   KL            -sum q l                  pi = q
                                           Renyi-1/2     -2 log sum sqrt(p q)      pi = softmax((u + t) / 2)

with m = (p + q) / 2 and g = log(q / m) / 2. Nothing divides by p or q, and shares of m are kept from
0 before their logarithm, so tokens whose p or q underflows add 0. The LK terms are functions of
the overlap, L1 and KL: a factor for each slot on the gradients of these.

The overlap is the accept rate, 1 - L1 / 2, summed by itself: in fp32 that difference is known to
some 1e-6, which is too little for the logarithm of a small rate, and its tilt has the same fault.

Shapes: c slots of a chunk, v/tp columns of this rank without padding.
"""  # noqa: E501

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ACCEPT_RATE_FLOOR = 1e-5
"""Of LK-alpha: below it the loss is constant."""
HYBRID_DECAY = 3.0
"""Of LK-hybrid: how fast KL gives way to L1 as the accept rate grows."""


class Pair(NamedTuple):
    """The two distributions in this shard, [c, v/tp] each."""

    p: Tensor
    q: Tensor
    keeps_q: bool
    """Whether q is the direction of a distance, so that L1 may not take its memory."""
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
    needs_log_ratio: bool = False


def _l1(pair: Pair, summed: bool) -> tuple[Tensor, list[Tensor]]:
    difference = torch.sub(pair.p, pair.q, out=None if pair.keeps_q else pair.q)
    distance = [difference.abs().sum(dim=-1)] if summed else []
    sign = difference.sign_()
    return sign, [*distance, _mean(sign, pair.p)] if summed else []


def _reverse_kl(pair: Pair, summed: bool) -> tuple[Tensor, list[Tensor]]:
    ratio = pair.known_log_ratio
    return ratio, [_mean(ratio, pair.p)] if summed else []


def _js(pair: Pair, summed: bool) -> tuple[Tensor, list[Tensor]]:
    tiny = torch.finfo(pair.p.dtype).tiny
    middle = torch.lerp(pair.p, pair.q, 0.5).clamp_(min=tiny)
    slope = _half_log_(pair.p / middle)
    if not summed:
        return slope, []
    mean = _mean(slope, pair.p)
    other = _half_log_(torch.div(pair.q, middle, out=middle))
    return slope, [mean + other.mul_(pair.q).sum(dim=-1), mean]


def _half_log_(share: Tensor) -> Tensor:
    """log(share) / 2 in place, of a share that may have underflowed. In base 2, where a CPU takes
    two thirds of the time of the natural logarithm."""
    return share.clamp_(min=torch.finfo(share.dtype).tiny).log2_().mul_(math.log(2) / 2)


def _overlap(pair: Pair, summed: bool) -> tuple[Tensor, list[Tensor]]:
    shared = torch.minimum(pair.p, pair.q)
    rate = [shared.sum(dim=-1)] if summed else []
    below = shared.lt_(pair.q)
    return below, [*rate, _mean(below, pair.p)] if summed else []


def _kl(pair: Pair, summed: bool) -> tuple[Tensor, list[Tensor]]:
    return pair.q, [-_mean(pair.known_log_ratio, pair.q)] if summed else []


def _mean(values: Tensor, distribution: Tensor) -> Tensor:
    """This shard's part of it, [c]."""
    return (values * distribution).sum(dim=-1)


DISTANCES = {
    "l1": Distance(_l1, 2),
    "kl": Distance(_kl, 1, is_pull=True, needs_log_ratio=True),
    "reverse_kl": Distance(_reverse_kl, 1, needs_log_ratio=True),
    "js": Distance(_js, 2),
    "overlap": Distance(_overlap, 2),
}
"""All but Renyi's, whose sum belongs to the first pass: its shift is a maximum of its own."""


def lk_alpha(distances: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss [c], and its slopes along the distances that it is made of."""
    rate = distances["overlap"]
    clamped = rate.clamp(ACCEPT_RATE_FLOOR, 1)
    return -clamped.log(), {"overlap": torch.where(rate < ACCEPT_RATE_FLOOR, 0, -1 / clamped)}


def lk_hybrid(distances: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss [c], and its slopes; the mixing factor is a constant in them."""
    mixing = (-HYBRID_DECAY * accept_rate(distances["l1"])).exp()
    slopes = {"kl": mixing, "l1": (1 - mixing) / 2}
    return slopes["kl"] * distances["kl"] + slopes["l1"] * distances["l1"], slopes


COMPOSED = {"lk_alpha": (lk_alpha, ("overlap",)), "lk_hybrid": (lk_hybrid, ("l1", "kl"))}
"""Terms that are functions of distances, and which."""


def accept_rate(l1: Tensor) -> Tensor:
    """Chance that the target keeps a draft token, 1 - L1 / 2 = sum min(p, q) (paper Eq. 8). In fp32
    within some 1e-6, also where it is smaller than that."""
    return (1 - l1 / 2).clamp(0, 1)
