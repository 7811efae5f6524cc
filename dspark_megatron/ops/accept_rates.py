"""Accept rates on a split vocabulary, forward only.

Slots go through in chunks as in the head loss, and no [n, v/tp] tensor outlives its chunk. It costs
two products with the vocabulary and the statistics of their logits; there are no gradients.

Shapes: n slots, c slots of a chunk, f features, v/tp columns of this rank.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.ops.chunk_budget import in_tiles
from dspark_megatron.ops.logit_terms import exp_shifted, precise
from dspark_megatron.ops.vocab_parallel import VocabShard, all_gather, all_reduce


class LogitFactors(NamedTuple):
    """Logits that are not made yet, `features @ weight^T`."""

    features: Tensor
    """[n, f]"""
    weight: Tensor
    """[v/tp, f] of this rank."""


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
    """Chance that the target keeps a draft token, [n] fp32 in [0, 1], the same on every rank.

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
        for out, (features, weight) in zip(logits, sides, strict=True):
            factors = features[part], weight[:real].t()
            out.addmm_(*factors, beta=0, alpha=1 / (temperature or 1.0))  # scaled, then rounded
        if temperature == 0:
            rates.append(_agreement(*logits, shard, tp_group))
        else:
            rates.append(_shared_mass(*logits, tp_group))
    return torch.cat(rates).float()


def _shared_mass(u: Tensor, t: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """sum min(p, q) over the whole vocabulary, [c]."""
    lses = all_gather(in_tiles(_log_sum_exps)(u, t), tp_group=tp_group).logsumexp(dim=0)  # [2, c]
    shared = in_tiles(_local_shared_mass)(u, t, *lses)
    return all_reduce(shared, tp_group=tp_group).clamp(max=1)


def _log_sum_exps(u: Tensor, t: Tensor) -> Tensor:
    """Of this shard's columns, [2, c]."""
    return torch.stack([x.to(precise(x.dtype)).logsumexp(dim=-1) for x in (u, t)])


def _local_shared_mass(u: Tensor, t: Tensor, draft_lse: Tensor, target_lse: Tensor) -> Tensor:
    p, q = exp_shifted(u, draft_lse), exp_shifted(t, target_lse)
    return torch.minimum(p, q, out=p).sum(dim=-1)


def _agreement(u: Tensor, t: Tensor, shard: VocabShard, tp_group: dist.ProcessGroup) -> Tensor:
    """1 where both sides have the same most likely token, else 0, [c]."""
    found = []
    for logits in (u, t):
        best = logits.max(dim=-1)  # the first of equals
        ids = best.indices + shard.vocab_start_index
        dtype = precise(logits.dtype)  # exact: fp32 counts to 2^24
        found += [best.values.to(dtype), ids.to(dtype)]
    gathered = all_gather(torch.stack(found), tp_group=tp_group)  # [tp, 4, c]
    values, ids = gathered[:, ::2], gathered[:, 1::2]  # [tp, 2, c]
    chosen = ids.gather(0, values.argmax(dim=0, keepdim=True))[0]  # ranks hold ascending ids
    return (chosen[0] == chosen[1]).to(gathered.dtype)
