"""Speculative acceptance: expected length of a round, and the lossless accept/reject step."""

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


def sample(probs: Tensor, generator: torch.Generator) -> Tensor:
    """One token id from each row. [n, v] -> [n] int64."""
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def accept_or_resample(
    draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator
) -> tuple[int, Tensor]:
    """Speculative sampling of one proposal: how many draft tokens stay, and the token after them.

    draft_tokens [k], draft_probs [k, v], target_probs [k + 1, v]. Token i stays with probability
    min(1, q_i / p_i); the first rejected one is replaced by a draw from max(0, q - p) normalised,
    and when all stay the bonus token comes from the target's last row. The kept tokens and the
    next one are then distributed as the target alone would have it (Leviathan et al. 2023).
    Returns (accepted, next_token []).
    """
    index = draft_tokens[:, None]
    q = target_probs[:-1].gather(1, index).squeeze(1)
    p = draft_probs.gather(1, index).squeeze(1)
    draws = torch.rand(draft_tokens.shape, generator=generator, device=draft_tokens.device)
    stays = draws * p < q
    accepted = int(stays.int().cumprod(dim=0).sum())
    if accepted == draft_tokens.numel():
        return accepted, sample(target_probs[-1:], generator)[0]
    residual = (target_probs[accepted] - draft_probs[accepted]).clamp(min=0)
    if residual.sum() <= 0:  # p == q up to rounding: a rejection there has no mass of its own
        residual = target_probs[accepted]
    return accepted, sample(residual[None], generator)[0]
