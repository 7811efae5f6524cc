"""How much of what the target computes is padding, said before a run from lengths alone."""

from torch import Tensor

from dspark_megatron.data.sampler import Blend, StepSampler
from dspark_megatron.run.check import RunPlan
from dspark_megatron.targets.huggingface.packing import SequencePacker
from dspark_megatron.targets.shared_pass import alike

_SAMPLES = 4096
"""Looked at, at most, but for those of one step."""


def describe_padding(
    plan: RunPlan, lengths: Tensor, blend: Blend | None, iterations: int
) -> str | None:
    """One line on the padding of the first steps with and without its two remedies; None where a
    pass has one sample, and so no padding, or no target is run. lengths: [n] of all samples.
    """
    config, train = plan.config, plan.config.train
    if plan.pass_size.samples == 1 or config.target.is_stored:
        return None
    steps = max(1, min(iterations, _SAMPLES // train.global_batch_size))
    planner, shares = SequencePacker.of(config.target, plan.shape.hidden_size), {}
    for grouped in (False, True):
        # As if on one rank: the micro-batches of all ranks are its own.
        sampler = StepSampler(
            len(lengths),
            train.seed,
            train.global_batch_size,
            train.micro_batch_size,
            dp_rank=0,
            dp_size=1,
            blend=blend,
            lengths=lengths if grouped else None,
        )
        of_steps = [
            [
                [int(lengths[ref.sample_index]) for ref in batch]
                for batch in sampler.micro_batches(n)
            ]
            for n in range(0, steps * train.global_batch_size, train.global_batch_size)
        ]
        together = [one for step in of_steps for one in _together(step, plan)]
        passes = [part for one in together for part in _passes(one, plan)]
        tokens = sum(map(sum, passes))
        padded = sum(len(samples) * max(samples) for samples in passes)
        whole = [sum(one, []) for one in together]
        packed = sum(group.positions for samples in whole for group in planner.groups(samples))
        shares[grouped, False], shares[grouped, True] = 1 - tokens / padded, 1 - tokens / packed
    text = (
        f"padding: {shares[config.data.group_by_length, config.target.packing]:.1%} of the "
        f"positions that the target computes in the first {steps:,} steps; as the samples come "
        f"{shares[False, False]:.1%}, with data.group_by_length {shares[True, False]:.1%}"
    )
    if config.target.provider != "huggingface":
        return text
    return (
        f"{text}, with target.packing {shares[False, True]:.1%}, with both {shares[True, True]:.1%}"
    )


def _together(step: list[list[int]], plan: RunPlan) -> list[list[list[int]]]:
    """What `SharedPasses` takes together of each rank's micro-batches, of which each has the
    lengths of its samples. step: those of all ranks, who take turns."""
    size = plan.pass_size.micro_batches
    of_ranks = [step[rank :: plan.dp_size] for rank in range(plan.dp_size)]
    return [own[at : at + size] for own in of_ranks for at in range(0, len(own), size)]


def _passes(together: list[list[int]], plan: RunPlan) -> list[list[int]]:
    """The samples of each pass without packing."""
    if plan.shards_target:
        return [sum(together, [])]
    return [
        sum((together[place] for place in places), [])
        for places in alike([max(samples) for samples in together])
    ]
