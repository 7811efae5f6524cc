"""Collectives over a vocabulary that is split over tensor-parallel ranks.

Rank i of tp holds the columns [i * v/tp, (i + 1) * v/tp) of the padded vocabulary. None of these
carries a gradient: the head loss writes its own.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's half-open range of the padded vocabulary, and how much of it is real."""

    vocab_start_index: int
    vocab_end_index: int
    vocab_size: int

    @classmethod
    def of_group(
        cls, vocab_size: int, padded_vocab_size: int, tp_group: dist.ProcessGroup
    ) -> "VocabShard":
        size = padded_vocab_size // tp_group.size()
        start = tp_group.rank() * size
        return cls(start, start + size, vocab_size)

    @property
    def num_padded(self) -> int:
        """Columns of this shard that are padding; they are its last ones."""
        size = self.vocab_end_index - self.vocab_start_index
        return min(max(self.vocab_end_index - self.vocab_size, 0), size)

    def mask_padding_(self, logits: Tensor) -> Tensor:
        """Set padded columns of [..., v/tp] to -inf, in place."""
        if self.num_padded:
            logits[..., logits.shape[-1] - self.num_padded :] = -torch.inf
        return logits

    def local_ids(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids as columns of this shard, and whether they lie in it; foreign ids become 0."""
        mine = (token_ids >= self.vocab_start_index) & (token_ids < self.vocab_end_index)
        return torch.where(mine, token_ids - self.vocab_start_index, 0), mine


def all_reduce_sum(tensor: Tensor, *, tp_group: dist.ProcessGroup) -> Tensor:
    """Sum over the group, in place. One all-reduce of the tensor; none for a group of one."""
    if tp_group.size() > 1:
        dist.all_reduce(tensor, group=tp_group)
    return tensor


def log_sum_exp(maxima: Tensor, sums: Tensor, *, tp_group: dist.ProcessGroup) -> Tensor:
    """Global log-sum-exp from each shard's row maxima and sums of exp(x - maximum).

    maxima, sums: [j, n] -> [j, n]. One all-gather of 2*j*n floats; none for a group of one. A
    shard that is all padding passes maxima of -inf and sums of 0.
    """
    if tp_group.size() == 1:
        return maxima + sums.log()
    local = torch.stack([maxima, sums])
    shards = local.new_empty(tp_group.size(), *local.shape)
    dist.all_gather(list(shards.unbind()), local, group=tp_group)
    top = shards[:, 0].amax(dim=0)
    total = (shards[:, 1] * (shards[:, 0] - top).exp()).sum(dim=0)
    return top + total.log()


def gather_vocab(logits: Tensor, vocab_size: int, *, tp_group: dist.ProcessGroup) -> Tensor:
    """All real columns of [..., v/tp] on every rank: [..., vocab_size].

    One all-gather of the whole tensor: for the few rows of decoding, never for training.
    """
    if tp_group.size() == 1:
        return logits[..., :vocab_size]
    shards = [torch.empty_like(logits) for _ in range(tp_group.size())]
    dist.all_gather(shards, logits.contiguous(), group=tp_group)
    return torch.cat(shards, dim=-1)[..., :vocab_size]
