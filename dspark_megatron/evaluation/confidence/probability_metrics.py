"""How well probabilities tell what happens: calibration error, its noise floor, AUC, Brier score.

A label is 1 where a draft token was kept and 0 where not, or the chance of that: it counts as
`label` of a kept token and as `1 - label` of a lost one. Figures of no predictions are NaN.

Shapes: n predictions and their labels, all fp64 in [0, 1].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_megatron.ops.seeds import derived_seed

_SURE = 1e-6


@dataclass(frozen=True)
class Bins:
    """Predictions in equally wide bins of [0, 1]; the last bin includes 1."""

    count: Tensor
    """[bins] int64."""
    predicted: Tensor
    """[bins] sum of the predictions."""
    observed: Tensor
    """[bins] sum of the labels."""

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: |mean prediction - mean label| of the bins, weighted by
        their counts."""
        return float((self.predicted - self.observed).abs().sum() / self.count.sum())


def binned(predictions: Tensor, labels: Tensor, bins: int) -> Bins:
    index = _bin_index(predictions, bins)
    count = torch.bincount(index, minlength=bins)
    return Bins(count, _sums(index, predictions, bins), _sums(index, labels, bins))


def noise_floor(predictions: Tensor, bins: int, *, seed: int, draws: int = 100) -> float:
    """Calibration error that these predictions would show if they were exactly calibrated and each
    label an independent draw: the mean over drawn labels."""
    index = _bin_index(predictions, bins)
    predicted = _sums(index, predictions, bins)
    generator = torch.Generator().manual_seed(derived_seed("noise floor", seed))
    total = 0.0
    for _ in range(draws):
        labels = torch.bernoulli(predictions, generator=generator)
        total += float((predicted - _sums(index, labels, bins)).abs().sum())
    return total / draws / len(predictions) if len(predictions) else float("nan")


def auc(predictions: Tensor, labels: Tensor) -> float:
    """Chance that a kept token has a higher prediction than a lost one, equal ones counted half;
    NaN where all were kept, or none."""
    values, place = predictions.unique(return_inverse=True)  # ascending
    kept, lost = (_sums(place, x, len(values)) for x in (labels, 1 - labels))
    below = lost.cumsum(dim=0) - lost
    return float((kept @ (below + lost / 2)) / (kept.sum() * lost.sum()))


def brier(predictions: Tensor, labels: Tensor) -> float:
    """Mean squared distance of the prediction from the outcome."""
    return float((labels * (1 - predictions) ** 2 + (1 - labels) * predictions**2).mean())


def log_loss(predictions: Tensor, labels: Tensor) -> Tensor:
    """Nats by which each outcome surprises, [n]; predictions are taken as at least a millionth
    away from 0 and 1, so that one surprise does not outweigh all else."""
    p = predictions.clamp(_SURE, 1 - _SURE)
    return -(labels * p.log() + (1 - labels) * (1 - p).log())


def _bin_index(predictions: Tensor, bins: int) -> Tensor:
    return (predictions * bins).long().clamp(max=bins - 1)


def _sums(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Sum of the values at each index. [n], [n] -> [size]"""
    return torch.zeros(size, dtype=values.dtype).index_add_(0, index, values)
