"""Cut a batch into forward passes of a bounded number of tokens, and put their states together."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.targets.base import TargetStates

RunPieces = Callable[[tuple[Tensor, ...]], list[TargetStates]]
"""Runs consecutive pieces [r, t] of the same r sequences, each after those before it."""


def states_in_passes(
    input_ids: Tensor, max_tokens: int, run: RunPieces, *, lockstep_group: dist.ProcessGroup | None
) -> TargetStates:
    """States of input_ids [b, s] from passes of at most `max_tokens` tokens: as many whole
    sequences as that holds, or a part of one.

    lockstep_group: ranks that must make equally many passes; those with fewer than others repeat
    one token for nothing. One all-reduce of a number, none without a group.
    """
    b, s = input_ids.shape
    rows = max(1, max_tokens // s)
    own = -(-b // rows) * -(-s // max_tokens)
    # Agreed before the first pass: in a pass the ranks already wait for each other.
    idle = _most(own, input_ids.device, lockstep_group) - own
    groups = [joined(run(group.split(max_tokens, dim=1)), dim=1) for group in input_ids.split(rows)]
    for _ in range(idle):
        run((input_ids[:1, :1],))
    return joined(groups, dim=0)


def _most(passes: int, device: torch.device, group: dist.ProcessGroup | None) -> int:
    if group is None:
        return passes
    most = torch.tensor(passes, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return int(most.item())


def joined(parts: list[TargetStates], dim: int) -> TargetStates:
    """States of parts of a batch, put together along dimension 0 or 1."""
    last_hidden = [part.last_hidden for part in parts if part.last_hidden is not None]
    return TargetStates(
        torch.cat([part.taps for part in parts], dim),
        torch.cat(last_hidden, dim) if last_hidden else None,
    )
