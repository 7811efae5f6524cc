"""Which sample is trained on when: a pure function of the seed and the samples consumed so far.

Position p of a run is sample p % num_samples of epoch p // num_samples, in that epoch's order. The
layout only decides which rank takes which position, as Megatron does.
"""

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_megatron.errors import require
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


class Shares(NamedTuple):
    """Sources one after the other, in the order of their samples."""

    sizes: tuple[int, ...]
    """Samples of each."""
    places: tuple[int, ...]
    """Places of an epoch that each fills; the sum is that of the sizes."""


def share_out(names: list[str], sizes: list[int], weights: list[float]) -> Shares:
    """Places by weight, rounded so that none is left over. ConfigError for a source that has no
    sample or would get no place."""
    num_samples = sum(sizes)
    exact = [num_samples * weight / sum(weights) for weight in weights]
    places = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (places[i] - exact[i], i))
    for i in by_remainder[: num_samples - sum(places)]:
        places[i] += 1
    for name, size, weight, count in zip(names, sizes, weights, places, strict=True):
        require(
            size > 0 and count > 0,
            f"{name} has {size:,} samples and data.weights {weight} gives it {count:,} of the "
            f"{num_samples:,} places of an epoch; both must be at least 1: leave it out of "
            "data.train_files, or raise its weight",
        )
    return Shares(tuple(sizes), tuple(places))


class Blend:
    """Sources in given shares, from places of an epoch to samples; a pure function of the seed.

    An epoch has as many places as there are samples, and each source its share of them. A source
    gives its samples in an order of its own, all of them before any comes again, and goes on in the
    next epoch where it stopped in this one.
    """

    def __init__(self, shares: Shares, seed: int) -> None:
        self._shares, self._seed = shares, seed

    def __call__(self, place: SampleRef) -> SampleRef:
        """The sample at a place, and how often its source was gone through before."""
        passed, index = _samples_of_epoch(self._shares, self._seed, place.epoch)
        return SampleRef(int(passed[place.sample_index]), int(index[place.sample_index]))


@lru_cache(maxsize=2)  # a step may cross from one epoch into the next
def _samples_of_epoch(shares: Shares, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Passes over the source before, and index of the sample, by place: [n] and [n] int64."""
    starts = accumulate(shares.sizes, initial=0)
    parts = []
    for source, (start, size, places) in enumerate(zip(starts, *shares, strict=False)):
        taken = torch.arange(epoch * places, (epoch + 1) * places)
        passed = taken // size
        first, last = int(passed[0]), int(passed[-1])
        orders = [
            permutation(size, "order of a source", seed, source, pass_)
            for pass_ in range(first, last + 1)
        ]
        parts.append((passed, start + torch.cat(orders)[taken - first * size]))
    passed, index = (torch.cat(part) for part in zip(*parts, strict=True))
    return passed, index


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
        blend: Blend | None = None,
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
        if (lengths := self._lengths) is not None:
            # The longest first: samples of about one length then share a micro-batch, ranks that
            # wait for each other have micro-batches of about one length, and the largest is first.
            batch = sorted(batch, key=lambda ref: -int(lengths[ref.sample_index]))
        size, stride = self._micro_batch_size, self._micro_batch_size * self._dp_size
        assert len(batch) % stride == 0, (
            f"global batch size ({len(batch)}) must be divisible by micro-batch size ({size}) x "
            f"data-parallel size ({self._dp_size}) = {stride}"
        )
        starts = range(self._dp_rank * size, len(batch), stride)  # Megatron's split
        return [batch[start : start + size] for start in starts]
