"""Weights that tensor-parallel ranks hold in parts, each whole on one rank that owns it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.mcore.split_matrix import SplitMatrix


@dataclass
class Weight:
    name: str
    parameter: Any
    """This rank's part."""
    split: SplitMatrix
    matrices: list[Tensor] = field(default_factory=list)
    """fp32 and whole, on the rank that owns it; none on the others."""


Round = list[list[Weight]]
"""By data-parallel and then tensor-parallel rank, a weight for each: these work at a time."""


class Owners:
    """Who owns which weight, and what the ranks send one another."""

    def __init__(
        self,
        weights: list[Weight],
        *,
        tp_group: dist.ProcessGroup,
        dp_group: dist.ProcessGroup | None,
    ) -> None:
        """dp_group: over whose ranks owners are spread, too; None: each data-parallel rank has an
        owner of every weight among its tensor-parallel ranks."""
        self._tp_group, self._dp_group = tp_group, dp_group
        self._place = 0 if dp_group is None else dp_group.rank()
        size = 1 if dp_group is None else dp_group.size()
        self.rounds = list(_rounds(weights, tp_group.size(), size))

    def own(self, one: Round) -> Weight | None:
        """What this rank owns among the weights of a round."""
        weights, rank = one[self._place], self._tp_group.rank()
        return weights[rank] if rank < len(weights) else None

    def gathered(self, one: Round, part: Callable[[Weight], Tensor]) -> list[Tensor]:
        """The whole matrices of this rank's own weight, from the parts of all tensor-parallel
        ranks. One all-to-all over these ranks: each sends as much as it holds of the weights."""
        parts = [part(weight).flatten() for weight in one[self._place]]
        own, ranks = self.own(one), self._tp_group.size()
        if ranks > 1 and parts:
            sent = [*map(len, parts), *[0] * (ranks - len(parts))]
            size = own.parameter.numel() if own else 0
            received = parts[0].new_empty(ranks * size)
            self._exchange(received, [size] * ranks, torch.cat(parts), sent)
            parts = list(received.chunk(ranks))
        return own.split.joined([one.view_as(own.parameter) for one in parts]) if own else []

    def spread(self, one: Round, matrices: list[Tensor], into: Mapping[str, Tensor]) -> None:
        """Fill every rank's parts from the owners' matrices. One all-to-all over the
        tensor-parallel ranks, and where owners are spread over data-parallel ranks a broadcast by
        each of these, in the type of the parts.

        matrices: in the place of this rank's own weight, whole; none where it owns none. into: by
        name, this rank's part of every weight of the round."""
        for place, weights in enumerate(one):
            if not weights:
                continue
            parts = [into[weight.name] for weight in weights]
            sizes = [part.numel() for part in parts]
            flat = parts[0].new_empty(sum(sizes))
            if place == self._place:
                self._own_parts(one, matrices, sizes, flat)
            if self._dp_group is not None:
                dist.broadcast(flat, group=self._dp_group, group_src=place)
            for part, value in zip(parts, flat.split(sizes), strict=True):
                part.copy_(value.view_as(part))

    def _own_parts(
        self, one: Round, matrices: list[Tensor], sizes: list[int], flat: Tensor
    ) -> None:
        """Fill `flat` with this rank's parts of the weights that this data-parallel rank owns."""
        ranks, own = self._tp_group.size(), self.own(one)
        parts = own.split.parts(matrices, ranks) if own else []
        handed = torch.cat([flat[:0], *(part.to(flat.dtype).flatten() for part in parts)])
        if ranks == 1:
            flat.copy_(handed)
            return
        sizes = sizes + [0] * (ranks - len(sizes))
        self._exchange(flat, sizes, handed, [len(handed) // ranks] * ranks)

    def _exchange(
        self, received: Tensor, received_sizes: list[int], sent: Tensor, sent_sizes: list[int]
    ) -> None:
        group = self._tp_group
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=group)


def _rounds(weights: list[Weight], tp_size: int, dp_size: int) -> Iterator[Round]:
    """The largest first: weights of about the same size are in a round, and no rank has more to
    hold than the first."""

    def size(weight: Weight) -> int:
        return weight.parameter.numel() * (1 if weight.split.dim is None else tp_size)

    ordered = sorted(weights, key=size, reverse=True)
    for start in range(0, len(ordered), tp_size * dp_size):
        this = ordered[start : start + tp_size * dp_size]
        yield [this[i * tp_size : (i + 1) * tp_size] for i in range(dp_size)]
