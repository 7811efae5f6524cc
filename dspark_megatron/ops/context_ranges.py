"""Which part of the context each block sees."""

from typing import NamedTuple

import torch
from torch import Tensor

from dspark_megatron.ops.transfer import to_device


class ContextRanges(NamedTuple):
    """For each of n blocks a half-open range of the context. Ranges that start alike are of one
    sample."""

    on_host: list[tuple[int, int]]
    """Groups of blocks are cut by these."""
    on_device: Tensor
    """[n, 2] the same numbers, for the masks."""

    @classmethod
    def of(cls, ranges: list[tuple[int, int]], device: torch.device) -> "ContextRanges":
        numbers = torch.tensor(ranges, dtype=torch.int64).view(-1, 2)
        return cls(ranges, to_device(numbers, device))
