"""Targets whose weights data-parallel ranks share."""

import dataclasses
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dspark_megatron.data.batch import Batch
from support.target_states import elements
from support.tiny_draft import CachedStates
from support.training_runs import run_training


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


def train_with_idle_micro_batches(runtime, config):
    """Train; some micro-batches teach nothing, of a rank more than of another."""
    from dspark_megatron.data.batch import MicroBatches

    make = MicroBatches._of

    def made(self, refs):
        batch = make(self, refs)
        if refs[0].sample_index % 5 != 0:
            return batch
        return dataclasses.replace(batch, blocks=batch.blocks.part(slice(0)))

    with mock.patch.object(MicroBatches, "_of", made):
        run_training(runtime, config)


class GatheredBytes(TorchDispatchMode):
    """What this rank hands to all-gathers inside a `with`."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "c10d::_allgather_base_":
            self.bytes += args[1].nbytes
        return func(*args, **(kwargs or {}))


def train_counting_passes(runtime, config):
    """Train; shape of each forward pass of the target, and the bytes that it gathered."""
    from dspark_megatron.targets.huggingface.target import HuggingFaceTarget

    run, passes = HuggingFaceTarget._run, []

    def counted(self, input_ids, **arguments):
        with GatheredBytes() as gathered:
            states = run(self, input_ids, **arguments)
        passes.append((tuple(input_ids.shape), gathered.bytes))
        return states

    with mock.patch.object(HuggingFaceTarget, "_run", counted):
        run_training(runtime, config)
    return passes
