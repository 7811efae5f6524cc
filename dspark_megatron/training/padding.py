"""How much of what the target computes is padding, said before a run from lengths alone."""

from torch import Tensor

from dspark_megatron.config import Config
from dspark_megatron.data.sampler import Blend, StepSampler
from dspark_megatron.targets.huggingface.packing import SequencePacker

_SAMPLES = 4096
"""Looked at, at most, but for those of one step."""


def describe_padding(
    config: Config, lengths: Tensor, blend: Blend | None, iterations: int, planner: SequencePacker
) -> str | None:
    """One line on the padding of the first steps with and without its two remedies; None where a
    micro-batch has one sample, and so no padding, or no target is run. lengths: [n] of all samples.
    """
    train = config.train
    if train.micro_batch_size == 1 or config.target.is_stored:
        return None
    steps = max(1, min(iterations, _SAMPLES // train.global_batch_size))
    shares = {}
    for grouped in (False, True):
        # As if on one rank: the micro-batches of all ranks are its own, in another order.
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
        batches = [
            [int(lengths[ref.sample_index]) for ref in batch]
            for step in range(steps)
            for batch in sampler.micro_batches(step * train.global_batch_size)
        ]
        tokens = sum(map(sum, batches))
        padded = sum(len(batch) * max(batch) for batch in batches)
        packed = sum(group.positions for batch in batches for group in planner.groups(batch))
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
