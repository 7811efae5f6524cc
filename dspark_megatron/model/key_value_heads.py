"""Key/value heads of a tensor-parallel rank, also where there are fewer of them than ranks.

Then each rank projects a part of a head, as of any column-parallel linear: so weights, gradients
and checkpoints are split evenly at every size. What is projected is gathered, and each rank attends
with the one head that its query heads share.

Shapes: g key/value heads, w numbers that are projected for a head.
"""

import torch.distributed as dist
from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region
from torch import Tensor


class KeyValueHeads:
    """Which of g heads a rank attends with."""

    def __init__(self, heads: int, *, tp_group: dist.ProcessGroup) -> None:
        """heads: a multiple or a divisor of the group's size."""
        self.heads, self.tp_group = heads, tp_group
        self.are_shared = heads < tp_group.size()

    def own(self, projected: Tensor) -> Tensor:
        """This rank's part of a column-parallel product, [..., g*w/tp], as whole heads
        [..., max(g/tp, 1), w]. Where ranks share heads, forward is an all-gather of [..., g*w], and
        backward a reduce-scatter: a head's gradient is the sum of its ranks'."""
        if not self.are_shared:
            return projected.unflatten(-1, (self.heads // self.tp_group.size(), -1))
        whole = all_gather_last_dim_from_tensor_parallel_region(projected, group=self.tp_group)
        head = self.tp_group.rank() * self.heads // self.tp_group.size()
        return whole.unflatten(-1, (self.heads, -1))[..., head : head + 1, :]
