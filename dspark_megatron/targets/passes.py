"""Cut a batch into forward passes of a bounded number of tokens, and put their states together."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.targets.base import TargetStates


class Sequences(NamedTuple):
    """Sequences that go through the target side by side."""

    pieces: tuple[Tensor, ...]
    """Consecutive pieces [r, t] of the same r sequences, a pass each, after those before it."""
    position_ids: Tensor | None = None
    """[r, t] of packed sequences, which are one piece."""


RunPieces = Callable[[Sequences], list[TargetStates]]
"""States of each piece."""


@dataclass(frozen=True)
class Passes:
    """Forward passes of the target for a batch, all but the last of one size."""

    sequences: int
    """Of one pass."""
    length: int
    """Tokens of each in it."""
    count: int

    @classmethod
    def of(cls, b: int, s: int, max_tokens: int | None) -> "Passes":
        """As many whole sequences as `max_tokens` holds, or a part of one; None: all at once."""
        if max_tokens is None:
            return cls(b, s, 1)
        sequences = min(b, max(1, max_tokens // s))
        count = math.ceil(b / sequences) * math.ceil(s / max_tokens)
        return cls(sequences, min(s, max_tokens), count)


def states_in_passes(
    input_ids: Tensor,
    max_tokens: int,
    run: RunPieces,
    *,
    lockstep_group: dist.ProcessGroup | None,
) -> TargetStates:
    """States of input_ids [b, s] from passes of at most `max_tokens` tokens. lockstep_group: see
    `run_in_step`."""
    b, s = input_ids.shape
    own = Passes.of(b, s, max_tokens)
    parts = input_ids.split(own.sequences)
    groups = [Sequences(part.split(own.length, dim=1)) for part in parts]
    return joined(run_in_step(groups, run, lockstep_group=lockstep_group), dim=0)


def run_in_step(
    groups: list[Sequences], run: RunPieces, *, lockstep_group: dist.ProcessGroup | None
) -> list[TargetStates]:
    """States of each group of sequences.

    lockstep_group: ranks that must make equally many passes; those with fewer repeat one token for
    nothing. One all-reduce of a number, none without a group.
    """
    own, some = sum(len(group.pieces) for group in groups), groups[0].pieces[0]
    # Agreed before the first pass: in a pass the ranks already wait for each other.
    idle = _most(own, some.device, lockstep_group) - own
    states = [joined(run(group), dim=1) for group in groups]
    for _ in range(idle):
        run(Sequences((some[:1, :1],)))
    return states


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
