"""What slots weigh by the chance that a round gets to them; constants in the gradient.

With c_j the chance that slot j's token is kept, and P_j = c_0 ... c_j that all up to it are:

    acceptance weight    P_j + P_{j+1} + ... + P_last    (D-PACE, D-PARD)
    reach                P_{j-1}, and 1 for slot 0

A slot that is not supervised has no chance of its own: it counts as 1 in the products and as 0 in
the sum.

Shapes: r supervised slots of n blocks, each with d slots that draft.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dspark_megatron.ops.objective.distances import accept_rate


@dataclass(frozen=True)
class BlockSlots:
    """Where the supervised slots of some blocks stand."""

    counts: Sequence[int]
    """Of each block, on the host: at least one."""
    index: Tensor
    """[r] int64 place in the flattened [n * d], ascending."""
    width: int
    """d"""

    def chunks(self, most: int) -> list[tuple[slice, "BlockSlots"]]:
        """As many blocks at a time as have `most` slots together, and one where it has more: their
        rows of the r, and their slots."""
        found, block, row = [], 0, 0
        while block < len(self.counts):
            end, stop = block + 1, row + self.counts[block]
            while end < len(self.counts) and stop + self.counts[end] <= row + most:
                stop += self.counts[end]
                end += 1
            own = self.index[row:stop] - block * self.width
            rows = slice(row, stop)
            found.append((rows, BlockSlots(self.counts[block:end], own, self.width)))
            block, row = end, stop
        return found

    def by_block(self, values: Tensor, gaps: float) -> Tensor:
        """[r] -> [n, d], `gaps` where a slot is not supervised."""
        slots = values.new_full((len(self.counts) * self.width,), gaps)
        return slots.index_copy(0, self.index, values).view(-1, self.width)

    def supervised(self, by_block: Tensor) -> Tensor:
        """[n, d] -> [r]"""
        return by_block.flatten().index_select(0, self.index)


def acceptance_weights(chances: Tensor, slots: BlockSlots) -> Tensor:
    """[r] of [r] chances. No collective."""
    products = slots.by_block(chances, 1).cumprod(dim=1)
    kept = slots.by_block(slots.supervised(products), 0)
    return slots.supervised(kept.flip(1).cumsum(dim=1).flip(1))


def reach(chances: Tensor, slots: BlockSlots) -> Tensor:
    """[r] of [r] chances. No collective."""
    before = slots.by_block(chances, 1)[:, :-1].cumprod(dim=1)
    return slots.supervised(torch.nn.functional.pad(before, (1, 0), value=1.0))


@dataclass(frozen=True)
class AcceptanceWeights:
    """`loss.weighting` for the slots of some blocks: known once their CE or accept rates are."""

    name: Literal["dpace", "dpard"]
    alpha: float
    slots: BlockSlots

    @property
    def by_target(self) -> bool:
        """Whether they compare with the target's distribution."""
        return self.name == "dpard"

    def chunks(self, most: int) -> list[tuple[slice, "AcceptanceWeights"]]:
        """As those of the slots: a weight depends on its own block alone."""
        return [(rows, replace(self, slots=slots)) for rows, slots in self.slots.chunks(most)]

    def of(self, ce: Tensor, l1: Tensor) -> Tensor:
        """[r] from the cross entropy and the raw L1 distance of each slot, [r] each."""
        likely = accept_rate(l1) if self.by_target else (-ce).exp()
        return acceptance_weights((1 - self.alpha) * likely + self.alpha, self.slots)
