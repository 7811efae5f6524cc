"""Rows of blocks or of context on their way between tensor-parallel ranks.

Between the parallel linears every rank has all rows; with sequence parallelism it has 1/tp of them
there (Korthikanti et al. 2022), and norms and residuals touch only these. Blocks are no sequence:
their slots, one block after the other, are simply cut into tp equal parts, and so is the context.

Shapes: t rows of width h; T: t padded to a multiple of tp.
"""

import copy

import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.mappings import all_to_all_hp2sp
from megatron.core.transformer import TransformerConfig
from torch import Tensor


def without_sequence_parallel(config: TransformerConfig) -> TransformerConfig:
    """The config for linears whose rows are gathered, or split, outside of them."""
    config = copy.copy(config)
    config.sequence_parallel = False
    return config


class TokenSplit:
    """The moves of rows that a config asks for: the plain ones, or those of sequence parallelism.

    Collectives of each move, forward / backward:

        move                 plain                       sequence parallel
        local                none                        none; it has no gradient
        from_columns         all-gather / a split        all-to-all / all-to-all
        to_linears           none / all-reduce           all-gather / reduce-scatter
        whole                none                        all-gather / a split
    """

    def __init__(self, config: TransformerConfig, *, tp_group: dist.ProcessGroup) -> None:
        self.is_split: bool = config.sequence_parallel
        self.tp_group = tp_group

    def padded(self, rows: Tensor) -> Tensor:
        """[t, ...] -> [T, ...] with zero rows at the end; unchanged where rows are whole."""
        missing = -len(rows) % self.tp_group.size() if self.is_split else 0
        return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows

    def local(self, rows: Tensor) -> Tensor:
        """This rank's part of rows that all have: [t, ...] -> [T/tp, ...]."""
        if not self.is_split:
            return rows
        return self.padded(rows).chunk(self.tp_group.size())[self.tp_group.rank()]

    def from_columns(self, columns: Tensor) -> Tensor:
        """What a column-parallel linear leaves, [t, h/tp], as this rank's rows [T/tp, h]. The plain
        linear has gathered its columns itself."""
        if not self.is_split:
            return columns
        return all_to_all_hp2sp(self.padded(columns).contiguous(), group=self.tp_group)

    def to_linears(self, rows: Tensor, count: int) -> Tensor:
        """This rank's rows as the input of column-parallel linears: all `count` of them, their
        gradient summed over the ranks."""
        if not self.is_split:
            return copy_to_tensor_model_parallel_region(rows, group=self.tp_group)
        return gather_from_sequence_parallel_region(rows, group=self.tp_group)[:count]

    def whole(self, rows: Tensor, count: int) -> Tensor:
        """All `count` rows for what every rank computes alike, and so with a whole gradient."""
        if not self.is_split:
            return rows
        return gather_from_sequence_parallel_region(
            rows, tensor_parallel_output_grad=False, group=self.tp_group
        )[:count]
