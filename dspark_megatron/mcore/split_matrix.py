"""Whole matrices from the parts of a weight that tensor-parallel ranks hold, and back.

Shapes: out, in of a whole weight; out/tp or in/tp of a rank's part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SplitMatrix:
    """How a weight is split over the ranks, and which matrices it is made of."""

    dim: int | None
    """That ranks split; None: each of them holds all of it."""
    matrices: int = 1
    """Whose rows it holds: 2 where gate and up, or keys and values, are one weight."""
    groups: int = 1
    """Parts of the whole weight, of equal size, each of which has rows of one matrix and then of
    the next."""

    def joined(self, parts: list[Tensor]) -> list[Tensor]:
        """The whole matrices, from every rank's part. Views where there is but one rank and one
        matrix."""
        if self.dim is None or len(parts) == 1:
            whole = parts[0]
        else:
            whole = torch.cat(parts, dim=self.dim)
        groups = whole.unflatten(0, (self.groups, self.matrices, -1))
        return [matrix.flatten(0, 1) for matrix in groups.unbind(1)]

    def parts(self, matrices: list[Tensor], ranks: int) -> list[Tensor]:
        """Every rank's part of the weight, from its whole matrices."""
        groups = [matrix.unflatten(0, (self.groups, -1)) for matrix in matrices]
        whole = torch.stack(groups, dim=1).flatten(0, 2)
        return [whole] * ranks if self.dim is None else list(whole.chunk(ranks, dim=self.dim))
