"""Speculative acceptance: expected length of a round, the lossless accept/reject step, and accept
rates on a split vocabulary.

Shapes: n slots (blocks in `tau` and `round_starts`), b drafts, k slots of a block, v vocabulary
(unpadded), c slots of a chunk, v/tp columns of this rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.ops.chunk_budget import in_tiles
from dspark_megatron.ops.logit_terms import exp_shifted, precise
from dspark_megatron.ops.logit_transform import LogitFactors
from dspark_megatron.ops.vocab_parallel import VocabShard, all_gather, all_reduce


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


@torch.no_grad()
def accept_rates(
    draft: LogitFactors,
    target: LogitFactors,
    shard: VocabShard,
    *,
    temperature: float,
    chunk_rows: int,
    tp_group: dist.ProcessGroup,
) -> Tensor:
    """Chance that the target keeps a draft token, [n] fp32 in [0, 1], the same on every rank;
    without gradients. As in the head loss no [n, v/tp] tensor outlives its chunk.

    Above temperature 0 it is `1 - tvd = sum min(p, q)` over the softmaxes of logits / temperature;
    at 0 it is 1 where the most likely tokens agree (of equal ones that of the lowest id), else 0.

    chunk_rows: slots whose logits exist at one time. For each slot and rank: an all-gather of 2
    floats and an all-reduce of 1; at temperature 0 an all-gather of 4. Each is one call a chunk.
    """
    n, real = len(draft.features), shard.num_real  # padded columns come last
    sides = draft, target
    buffers = [side.features.new_empty(min(chunk_rows, n), real) for side in sides]
    rates = [draft.features.new_empty(0)]
    for start in range(0, n, chunk_rows):
        part = slice(start, min(start + chunk_rows, n))
        logits = [buffer[: part.stop - start] for buffer in buffers]  # [c, v/tp] each
        for out, side in zip(logits, sides, strict=True):
            side.product(part, out, temperature=temperature or 1.0)
        if temperature == 0:
            rates.append(_agreement(logits, shard, tp_group))
        else:
            rates.append(_shared_mass(logits, tp_group))
    return torch.cat(rates).float()


def _shared_mass(logits: list[Tensor], tp_group: dist.ProcessGroup) -> Tensor:
    """sum min(p, q) over the whole vocabulary, [c]."""
    found = in_tiles(_log_sum_exps)(*logits)
    lses = all_gather(found, tp_group=tp_group).logsumexp(dim=0)  # [2, c]
    shared = in_tiles(_local_shared_mass)(*logits, *lses)
    return all_reduce(shared, tp_group=tp_group).clamp(max=1)


def _log_sum_exps(u: Tensor, t: Tensor) -> Tensor:
    """Of this shard's columns, [2, c]."""
    return torch.stack([x.to(precise(x.dtype)).logsumexp(dim=-1) for x in (u, t)])


def _local_shared_mass(u: Tensor, t: Tensor, draft_lse: Tensor, target_lse: Tensor) -> Tensor:
    p, q = exp_shifted(u, draft_lse), exp_shifted(t, target_lse)
    return torch.minimum(p, q, out=p).sum(dim=-1)


def _agreement(logits: list[Tensor], shard: VocabShard, tp_group: dist.ProcessGroup) -> Tensor:
    """1 where both sides have the same most likely token, else 0, [c]."""
    found = []
    for side in logits:
        best = side.max(dim=-1)  # the first of equals
        ids = best.indices + shard.vocab_start_index
        dtype = precise(side.dtype)  # exact: fp32 counts to 2^24
        found += [best.values.to(dtype), ids.to(dtype)]
    gathered = all_gather(torch.stack(found), tp_group=tp_group)  # [tp, 4, c]
    values, ids = gathered[:, ::2], gathered[:, 1::2]  # [tp, 2, c]
    chosen = ids.gather(0, values.argmax(dim=0, keepdim=True))[0]  # ranks hold ascending ids
    return (chosen[0] == chosen[1]).to(gathered.dtype)
