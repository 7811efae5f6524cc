"""Runs in which the target's states of some samples are no numbers, or huge."""

from unittest import mock

import torch

from support.training_runs import run_training


def run_poisoned(runtime, config, samples, value=float("nan"), **options):
    """Train; the taps of these samples, by their index in the data, have this value."""
    from dspark_megatron.training import loop

    source = loop.states_source

    def poisoned(*arguments):
        target = source(*arguments)
        states = target.states

        def with_bad_ones(batch):
            found = states(batch)
            bad = [i for i, sample in enumerate(batch.sample_indices) if sample in samples]
            found.taps[bad] = torch.tensor(value).to(found.taps)
            return found

        target.states = with_bad_ones
        return target

    with mock.patch.object(loop, "states_source", poisoned):
        run_training(runtime, config, **options)
