"""Speculative acceptance: expected length of a round, and the lossless accept/reject step.

Shapes: n rows, b drafts, k slots, v vocabulary (unpadded).
"""

import torch
from torch import Tensor


def tau(accept_rate: Tensor, eval_mask: Tensor) -> Tensor:
    """Expected tokens of a round, bonus token included: 1 + sum_k prod_{i<=k} accept_rate_i.

    accept_rate [n, k] in [0, 1], eval_mask [n, k] bool; slots after a gap do not count -> [n].
    """
    return 1 + (accept_rate * eval_mask).cumprod(dim=-1).sum(dim=-1)


def round_starts(accept_rate: Tensor, eval_mask: Tensor, anchor_positions: Tensor) -> Tensor:
    """Chance that a decoder which writes this text starts a round at each of its anchors.

    Every anchor of one sample, ascending: accept_rate [n, k] and eval_mask [n, k] as in `tau`,
    anchor_positions [n] -> float64 [n]. An answer is a run of neighbouring anchors: its first
    token starts a round, and a round of j kept tokens hands over to the anchor j + 1 further on.
    So the sum is the expected number of rounds, and anchors / rounds the expected tau.
    """
    n, k = accept_rate.shape
    survival = (accept_rate.double() * eval_mask).cumprod(dim=1)
    before = torch.cat([survival.new_ones(n, 1), survival[:, :-1]], dim=1)
    lengths = torch.cat([before - survival, survival[:, -1:]], dim=1)  # [n, k + 1] of 1 to k + 1
    positions = anchor_positions.tolist()
    chance = survival.new_zeros(positions[-1] + k + 2 if n else 0)  # by position
    for i, (position, row) in enumerate(zip(positions, lengths, strict=True)):
        if i == 0 or positions[i - 1] != position - 1:
            chance[position] = 1
        # What leads past the end of the answer lands on no anchor.
        chance[position + 1 : position + k + 2] += chance[position] * row
    return chance[anchor_positions]


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax at a temperature; one-hot of the argmax at 0. [..., v] -> fp32 [..., v]."""
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
    return torch.softmax(logits.float() / temperature, dim=-1)


def sample(probs: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One token id from each row, drawn with its own generator. [n, v] -> [n] int64."""
    rows = zip(probs.split(1), generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=own).flatten() for row, own in rows])


def overlap(draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """Chance that the target keeps a token of the draft: sum of min(p, q), which is 1 - tvd (paper
    Eq. 8). [..., v] each -> [...]."""
    return torch.minimum(draft_probs, target_probs).sum(dim=-1)


def judge(
    draft_tokens: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    lengths: Tensor,
    draws: Tensor,
) -> tuple[Tensor, Tensor]:
    """Speculative sampling of b drafts: how many tokens of each stay, and the distribution of the
    token after them.

    draft_tokens [b, k], draft_probs [b, k, v], target_probs [b, k + 1, v]; lengths [b]: the tokens
    of a draft that count, the rest is not looked at; draws [b, k], uniform in [0, 1). Token i stays
    with probability min(1, q_i / p_i); the first rejected one is replaced by a draw from
    max(0, q - p) normalised, and when all of them stay the next token is the target's own. The kept
    tokens and the next one are then distributed as the target alone would have it (Leviathan et al.
    2023), however long a draft is, as long as its length does not depend on what it is cut off
    before. Returns (accepted [b] int64, next_probs [b, v], not normalised).
    """
    slots = torch.arange(draft_tokens.shape[1], device=lengths.device)
    if not len(slots):
        return torch.zeros_like(lengths), target_probs[:, 0]
    index = draft_tokens[..., None]
    q = target_probs[:, :-1].gather(2, index).squeeze(2)  # [b, k]
    p = draft_probs.gather(2, index).squeeze(2)
    stays = (draws * p < q) & (slots < lengths[:, None])
    accepted = stays.long().cumprod(dim=1).sum(dim=1)
    rows = torch.arange(len(accepted), device=accepted.device)
    own = target_probs[rows, accepted]  # [b, v]
    rejected = accepted < lengths
    residual = (own - draft_probs[rows, accepted.clamp(max=len(slots) - 1)]).clamp(min=0)
    # p == q up to rounding: a rejection there has no mass of its own.
    replaced = rejected & (residual.sum(dim=-1) > 0)
    return accepted, torch.where(replaced[:, None], residual, own)
