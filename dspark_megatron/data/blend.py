"""Sources in given shares: which sample a place of an epoch stands for.

An epoch has as many places as there are samples, and each source its share of them. A source gives
its samples in an order of its own, all of them before any comes again, and goes on in the next
epoch where it stopped in this one.
"""

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_megatron.data.sampler import SampleRef, permutation
from dspark_megatron.errors import require


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
    """From places of an epoch to samples; a pure function of the seed."""

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
