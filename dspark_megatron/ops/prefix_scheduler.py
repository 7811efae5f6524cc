"""How many draft slots of each request the target verifies, from their confidences and from what a
step costs.

A step verifies B tokens: the anchor of each of R requests and the first l_r draft slots of request
r. It is expected to gain `tau = R + sum of the survivals of those slots` tokens, and SPS(B) such
steps fit into a second, so `tau * SPS(B)` is its throughput. Two ways to choose the lengths l_r:

- `early_stopping_lengths`: Algorithm 1 of the DSpark paper, from this step's confidences;
- `global_budget` of an earlier step's confidences, then `lengths_for_budget` of this step's: what
  engines run, since the size of a step is then known before its drafts are.

**Both are lossless.** They admit one slot after the other, the likeliest of the requests' next
slots first. The survival of slot j depends on the draft tokens before j alone, so which slot is
next and whether it is admitted depends on the tokens of slots that are admitted already: no slot is
admitted or dropped for its own token. Those of other requests may well decide, but they were drawn
independently. So the tokens of all requests are distributed, jointly, as the target alone would
have it. What that takes:

1. confidence j is a function of the draft tokens before slot j, not of token j itself: so is
   DSpark's confidence head, but not an estimate from the drawn token's own probability;
2. draft tokens are drawn independently for each request, and anew in each step;
3. a budget is fixed before this step's tokens are drawn: any earlier step's confidences will do;
4. a slot that is not verified is dropped, and the target draws the token of its place afresh.

Without 3, the budget that suits this step's own confidences best, a slot is verified because its
token makes *later* slots look good, and the output is biased. At temperature 0 all lengths are
lossless.

Shapes: R requests, k slots. `sps` [R*k + 1] holds the steps per second when R, R + 1, ...,
R*(k + 1) tokens are verified.
"""

import torch
from torch import Tensor


def survival(confidence: Tensor) -> Tensor:
    """Chance that a slot and all before it are kept: the running product. [R, k] -> [R, k]."""
    return confidence.cumprod(dim=-1)


def early_stopping_lengths(confidence: Tensor, sps: Tensor) -> Tensor:
    """Slots to verify, by Algorithm 1: the likeliest slot of all requests is admitted as long as
    that raises the throughput; the first one that does not ends it, whatever might come behind.

    confidence [R, k] in [0, 1], calibrated; sps [R*k + 1] -> [R] int64 in 0..k. A throughput that
    stays equal has not been raised: a slot that nobody expects to be kept is not verified.
    """
    throughput = _throughput(confidence, sps)
    admitted = (throughput[1:] > throughput[:-1]).long().cumprod(dim=0).sum()
    return lengths_for_budget(confidence, admitted)


def global_budget(confidence: Tensor, sps: Tensor) -> Tensor:
    """Number of slots with which the throughput is highest, the smallest of several.

    confidence [R, k] of an *earlier* step (see the top of this file), sps [R*k + 1] -> [] int64 in
    0..R*k. It finds a peak that lies behind a step of `sps`, where early stopping ends before it.
    """
    return _throughput(confidence, sps).argmax()


def lengths_for_budget(confidence: Tensor, budget: int | Tensor) -> Tensor:
    """The `budget` likeliest slots of this step, as slots to verify of each request.

    confidence [R, k] in [0, 1], budget in 0..R*k -> [R] int64 in 0..k. Slots of equal survival are
    taken by their place in the block, then by request.
    """
    requests, slots = confidence.shape
    # Slot by slot, so that a stable sort keeps a slot behind the slots before it. [k*R]
    order = survival(confidence).t().flatten().sort(descending=True, stable=True).indices
    admitted = torch.arange(requests * slots, device=confidence.device) < budget
    lengths = torch.zeros(requests, dtype=torch.int64, device=confidence.device)
    return lengths.index_add_(0, order % requests, admitted.long())


def _throughput(confidence: Tensor, sps: Tensor) -> Tensor:
    """Expected tokens per second with the 0, 1, ..., R*k likeliest slots. -> fp64 [R*k + 1]."""
    requests, slots = confidence.shape
    if sps.shape != (requests * slots + 1,):
        raise ValueError(
            f"sps must hold {requests * slots + 1} values, for {requests} to "
            f"{requests * (slots + 1)} tokens, and has shape {list(sps.shape)}"
        )
    best = survival(confidence).flatten().sort(descending=True).values.double()
    tau = requests + torch.cat([best.new_zeros(1), best.cumsum(dim=0)])
    return tau * sps
