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
    def num_real(self) -> int:
        """Entries of this shard that are no padding; they are its first ones."""
        return min(self.vocab_end_index, self.vocab_size) - self.vocab_start_index

    def local_columns(self, token_ids: Tensor) -> Tensor:
        """Ids as columns of this shard; -1 for those of other shards."""
        mine = (token_ids >= self.vocab_start_index) & (token_ids < self.vocab_end_index)
        return torch.where(mine, token_ids - self.vocab_start_index, -1)


def all_reduce(tensor: Tensor, *, tp_group: dist.ProcessGroup) -> Tensor:
    """Sum over the group, in place. One all-reduce of the tensor; none for a group of one."""
    if tp_group.size() > 1:
        dist.all_reduce(tensor, group=tp_group)
    return tensor


def all_gather(tensor: Tensor, *, tp_group: dist.ProcessGroup) -> Tensor:
    """[...] of every rank as [tp, ...]. One all-gather; none for a group of one."""
    if tp_group.size() == 1:
        return tensor[None]
    shards = tensor.new_empty(tp_group.size(), *tensor.shape)
    # gloo takes no further dimension
    dist.all_gather_into_tensor(shards.flatten(), tensor.flatten(), group=tp_group)
    return shards


def combine_log_sum_exp(shifts: Tensor, sums: Tensor) -> Tensor:
    """Log-sum-exp over all shards of [tp, n] shifts and sums of exp(x - shift) -> [n]."""
    top = shifts.amax(dim=0)
    return top + (sums * (shifts - top).exp()).sum(dim=0).log()


def gather_vocab(logits: Tensor, vocab_size: int, *, tp_group: dist.ProcessGroup) -> Tensor:
    """All real columns of [..., v/tp] on every rank: [..., vocab_size].

    One all-gather of the whole tensor: for the few rows of decoding, never for training.
    """
    if tp_group.size() == 1:
        return logits[..., :vocab_size]
    shards = [torch.empty_like(logits) for _ in range(tp_group.size())]
    dist.all_gather(shards, logits.contiguous(), group=tp_group)
    return torch.cat(shards, dim=-1)[..., :vocab_size]
