"""Ways to decide how much of each draft is verified; all of them are lossless.

Shapes: R requests, k slots.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dspark_megatron.ops.prefix_scheduler import (
    early_stopping_lengths,
    global_budget,
    lengths_for_budget,
)


@dataclass(frozen=True)
class Policy:
    """Decides how many slots of each request are verified."""

    name: str
    lengths: Callable[[Tensor], Tensor]
    """Confidences of a step, [R, k] -> [R] int64; called step by step."""
    drafts: bool = True


def verify_policies(
    sps: Tensor, num_draft_tokens: int, *, thresholds: Sequence[float], lag: int
) -> list[Policy]:
    """Those that are worth comparing, the one without drafts first.

    sps [R*k + 1]: steps per second; see ops/prefix_scheduler.py. thresholds: each is a policy of
    its own. lag: steps by which the confidences of a budget are older than those it is spent on.
    """
    static = [(f"threshold {t:g}", partial(threshold_lengths, threshold=t)) for t in thresholds]
    return [
        Policy("no drafting", partial(_fixed_lengths, length=0), drafts=False),
        *(
            Policy(f"fixed {n}", partial(_fixed_lengths, length=n))
            for n in range(1, num_draft_tokens + 1)
        ),
        *(Policy(name, lengths) for name, lengths in static),
        Policy("early stopping", partial(early_stopping_lengths, sps=sps)),
        Policy(f"budget, lag {lag}", LaggedBudget(lambda _requests: sps, lag)),
    ]


def threshold_lengths(confidence: Tensor, threshold: float) -> Tensor:
    """Slots before the first one whose own confidence (not its survival) is below the threshold,
    as DeepSpec cuts a draft. [R, k] -> [R]."""
    return (confidence >= threshold).long().cumprod(dim=1).sum(dim=1)


class LaggedBudget:
    """A budget from the confidences of `lag` steps ago, spent on those of this step. The first
    steps, which have none, count every slot as certain, as SGLang does. Where the number of
    requests has changed since, each gets its share."""

    def __init__(self, sps_of: Callable[[int], Tensor], lag: int) -> None:
        """sps_of: steps per second of a step of so many requests, [R*k + 1]."""
        self.sps_of = sps_of
        self.earlier: deque[Tensor] = deque(maxlen=lag)

    def __call__(self, confidence: Tensor) -> Tensor:
        full = len(self.earlier) == self.earlier.maxlen
        known = self.earlier[0] if full else torch.ones_like(confidence)
        self.earlier.append(confidence)
        budget = global_budget(known, self.sps_of(len(known)))
        return lengths_for_budget(confidence, budget * len(confidence) // len(known))


def _fixed_lengths(confidence: Tensor, length: int) -> Tensor:
    return torch.full((len(confidence),), length)
