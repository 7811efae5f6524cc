"""Targets whose weights data-parallel ranks share."""

import torch

from dspark_megatron.data.batch import Batch
from support.target_states import elements
from support.tiny_draft import CachedStates


def own_states(runtime, config, with_last_hidden):
    """States of another sequence, and of another length, on each data-parallel rank; elements of
    the target on this rank before and after."""
    from dspark_megatron.run.build import build_target
    from dspark_megatron.run.check import check

    target = build_target(
        check(config, runtime.world_size), runtime, with_last_hidden=with_last_hidden
    )
    before = elements(target.model)
    ids = torch.arange(7 + runtime.dp_group.rank())[None] * 3 + 20
    states = [target.states(Batch(ids)) for _ in range(2)][1]
    return ids, states.taps, states.last_hidden, before, elements(target.model)


class CountedStates(CachedStates):
    lockstep, calls = True, 0

    def states(self, batch):
        self.calls += 1
        return super().states(batch)
