"""Accept rates on a split vocabulary, forward only.

Rows go through in chunks as in the head loss, and no [rows, v/tp] tensor outlives its chunk. It
costs two products with the vocabulary and the statistics of their logits; there are no gradients.

Shapes: n rows, c rows of a chunk, f features, v/tp columns of this rank.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.ops.chunk_budget import tile_rows
from dspark_megatron.ops.logit_passes import in_tiles
from dspark_megatron.ops.logit_terms import exp_shifted, precise
from dspark_megatron.ops.vocab_parallel import VocabShard, start_all_gather, start_all_reduce


class LogitRows(NamedTuple):
    """Rows of logits that are not made yet, `features @ weights^T`."""

    features: Tensor
    """[n, f]"""
    weights: Tensor
    """[v/tp, f] of this rank."""


@torch.no_grad()
def accept_rates(
    draft: LogitRows,
    teacher: LogitRows,
    shard: VocabShard,
    *,
    temperature: float,
    chunk_rows: int,
    tp_group: dist.ProcessGroup,
) -> Tensor:
    """Chance that the target keeps a draft token, [n] fp32 in [0, 1], the same on every rank.

    Above temperature 0 it is `1 - tvd = sum min(p, q)` over the softmaxes of logits / temperature;
    at 0 it is 1 where the most likely tokens agree (of equal ones that of the lowest id), else 0.

    chunk_rows: rows whose logits exist at one time. For each row and rank: an all-gather of 2
    floats and an all-reduce of 1; at temperature 0 an all-gather of 4. Each is one call a chunk.
    """
    n, real = len(draft.features), shard.num_real  # padded columns come last
    sides = [LogitRows(side.features, side.weights[:real]) for side in (draft, teacher)]
    chunk = min(chunk_rows, n)
    buffers = [side.features.new_empty(chunk, real) for side in sides]
    tile = min(tile_rows(real, draft.features.device), chunk_rows)
    room = draft.features.new_empty(2, tile, real, dtype=precise(draft.features.dtype))
    rates = room.new_empty(n)
    for start in range(0, n, chunk_rows):
        part = slice(start, min(start + chunk_rows, n))
        logits = [
            _scaled_logits(side, part, temperature or 1.0, buffer)
            for side, buffer in zip(sides, buffers, strict=True)
        ]
        if temperature == 0:
            rates[part] = _agreement(*logits, shard, room, tp_group)
        else:
            rates[part] = _shared_mass(*logits, room, tp_group)
    return rates.float()


def _scaled_logits(rows: LogitRows, part: slice, temperature: float, buffer: Tensor) -> Tensor:
    """Logits / temperature of some rows, [c, v/tp], scaled before they are rounded."""
    out = buffer[: part.stop - part.start]
    return out.addmm_(rows.features[part], rows.weights.t(), beta=0, alpha=1 / temperature)


def _shared_mass(
    draft: Tensor, teacher: Tensor, room: Tensor, tp_group: dist.ProcessGroup
) -> Tensor:
    """sum min(p, q) over the whole vocabulary, [c]."""
    found = in_tiles(_log_sum_exps, room)(draft, teacher)
    lses = start_all_gather(found, tp_group=tp_group).wait().logsumexp(dim=0)  # [2, c]
    shared = in_tiles(_local_shared_mass, room)(draft, teacher, *lses)
    return start_all_reduce(shared, tp_group=tp_group).wait().clamp(max=1)


def _log_sum_exps(draft: Tensor, teacher: Tensor, room: tuple[Tensor, Tensor]) -> Tensor:
    """Of this shard's columns, [2, c]."""
    found = []
    for logits, out in zip((draft, teacher), room, strict=True):
        shift = logits.amax(dim=-1).to(out.dtype)
        found.append(shift + exp_shifted(logits, shift, out).sum(dim=-1).log())
    return torch.stack(found)


def _local_shared_mass(
    draft: Tensor,
    teacher: Tensor,
    draft_lse: Tensor,
    target_lse: Tensor,
    room: tuple[Tensor, Tensor],
) -> Tensor:
    p, q = exp_shifted(draft, draft_lse, room[0]), exp_shifted(teacher, target_lse, room[1])
    return torch.minimum(p, q, out=p).sum(dim=-1)


def _agreement(
    draft: Tensor, teacher: Tensor, shard: VocabShard, room: Tensor, tp_group: dist.ProcessGroup
) -> Tensor:
    """1 where both sides have the same most likely token, else 0, [c]."""
    found = []
    for logits in (draft, teacher):
        best = logits.max(dim=-1)  # the first of equals
        ids = best.indices + shard.vocab_start_index
        found += [best.values.to(room.dtype), ids.to(room.dtype)]  # exact: fp32 counts to 2^24
    gathered = start_all_gather(torch.stack(found), tp_group=tp_group).wait()  # [tp, 4, c]
    values, ids = gathered[:, ::2], gathered[:, 1::2]  # [tp, 2, c]
    chosen = ids.gather(0, values.argmax(dim=0, keepdim=True))[0]  # ranks hold ascending ids
    return (chosen[0] == chosen[1]).to(room.dtype)
