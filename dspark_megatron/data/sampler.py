"""Which sample is trained on when: a pure function of the seed and the samples consumed so far.

Position p of a run is sample p % num_samples of epoch p // num_samples, in that epoch's order. The
layout only decides which rank takes which position, as Megatron does.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_megatron.ops.seeds import derived_seed


class SampleRef(NamedTuple):
    """One use of a sample."""

    epoch: int
    """Passes over the data completed before, from 0."""
    sample_index: int
    """In [0, num_samples)."""


@lru_cache(maxsize=2)  # a step may cross from one epoch into the next
def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The permutation of an epoch: [num_samples] int64. Shared: do not change it."""
    return permutation(num_samples, "order", seed, epoch)


def permutation(size: int, *seed_parts: object) -> Tensor:
    """[size] int64, a function of the parts of its seed alone."""
    generator = torch.Generator().manual_seed(derived_seed(*seed_parts))
    return torch.randperm(size, generator=generator)


def sample_at(position: int, num_samples: int, seed: int) -> SampleRef:
    """The sample at a position (>= 0) of the run; runs on over the ends of epochs."""
    epoch, place = divmod(position, num_samples)
    return SampleRef(epoch, int(epoch_order(num_samples, seed, epoch)[place]))


def global_batch(
    consumed_samples: int, global_batch_size: int, num_samples: int, seed: int
) -> list[SampleRef]:
    """The samples of the step that starts after `consumed_samples`, whatever the layout."""
    positions = range(consumed_samples, consumed_samples + global_batch_size)
    return [sample_at(position, num_samples, seed) for position in positions]


def by_length(batch: list[SampleRef], lengths: Tensor) -> list[SampleRef]:
    """A global batch with its longest samples first, equal ones in their order. Dealt out so,
    samples of about one length share a micro-batch, and ranks that wait for each other have
    micro-batches of about one length; the largest comes first."""
    return sorted(batch, key=lambda ref: -int(lengths[ref.sample_index]))


def micro_batches(
    batch: list[SampleRef], micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[SampleRef]]:
    """This data-parallel rank's share of a global batch: its micro-batch j starts at
    (j * dp_size + dp_rank) * micro_batch_size."""
    stride = dp_size * micro_batch_size
    assert len(batch) % stride == 0, (
        f"global batch size ({len(batch)}) must be divisible by micro-batch size "
        f"({micro_batch_size}) x data-parallel size ({dp_size}) = {stride}"
    )
    starts = range(dp_rank * micro_batch_size, len(batch), stride)
    return [batch[start : start + micro_batch_size] for start in starts]


class StepSampler:
    """The samples of each step for one data-parallel rank."""

    def __init__(
        self,
        num_samples: int,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        blend: Callable[[SampleRef], SampleRef] | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        """blend: the sample that a place of an epoch stands for; None: that of its number.
        lengths: [num_samples], to group by; None deals samples out in their order."""
        self._num_samples, self._seed = num_samples, seed
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._blend, self._lengths = blend, lengths

    def micro_batches(self, consumed_samples: int) -> list[list[SampleRef]]:
        """The step that starts after `consumed_samples` (of all ranks together):
        global_batch_size / (micro_batch_size * dp_size) lists of micro_batch_size samples."""
        batch = global_batch(
            consumed_samples, self._global_batch_size, self._num_samples, self._seed
        )
        if self._blend is not None:
            batch = [self._blend(place) for place in batch]
        if self._lengths is not None:
            batch = by_length(batch, self._lengths)
        return micro_batches(batch, self._micro_batch_size, self._dp_rank, self._dp_size)
