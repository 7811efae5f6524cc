"""Whether temperatures are better than none on rounds that they were not fitted on, beyond what
chance explains.

Shapes: n rounds, k slots, p prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_megatron.evaluation.confidence.probability_metrics import binned, log_loss
from dspark_megatron.evaluation.confidence.temperature_scaling import confidence

LEAST_PROMPTS = 6
"""Of fewer, all may agree by chance: 1 in 32 times that five do."""
_RESAMPLES, _QUANTILES = 1000, (0.025, 0.975)


@dataclass(frozen=True)
class Gain:
    """By how much temperatures lower the log loss of the survival."""

    mean: float
    low: float
    high: float
    """The 95% interval, by resampling prompts: rounds of one are not independent."""
    lowers_error: bool
    """The calibration error, too, is no larger."""

    @property
    def is_real(self) -> bool:
        return self.low > 0 and self.lowers_error

    def describe(self) -> str:
        loss = f"lower the log loss by {self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"
        error = "lower" if self.lowers_error else "raise"
        return f"{loss} and {error} the calibration error"


class GainJudge:
    """Compares temperatures on the prompts held out."""

    def __init__(self, logits: Tensor, labels: Tensor, prompt: Tensor, bins: int) -> None:
        """logits, labels [n, k]: of the confidence head; of the survival. prompt [n]."""
        self._logits, self._labels, self._bins = logits, labels, bins
        numbers, self._prompt = prompt.unique(return_inverse=True)
        self.prompts = len(numbers)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(self.prompts, (_RESAMPLES, self.prompts), generator=generator)
        times = torch.zeros(_RESAMPLES, self.prompts, dtype=torch.float64)
        self._times = times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))

    def gain(self, old: Sequence[float], new: Sequence[float], first: int = 0) -> Gain | None:
        """Of new temperatures over old ones, of as many slots, in the slots from `first` on; None
        where the prompts are too few to tell."""
        sums = torch.zeros(2, self.prompts, dtype=torch.float64)  # gained, rounds
        errors = torch.zeros(2, dtype=torch.float64)
        survival = [self._survival(temperatures) for temperatures in (old, new)]
        for slot in range(first, len(new)):
            known = ~self._labels[:, slot].isnan()
            if not known.any() or self.prompts < LEAST_PROMPTS:
                continue
            labels = self._labels[known, slot]
            before, after = (predictions[known, slot] for predictions in survival)
            gained = log_loss(before, labels) - log_loss(after, labels)
            place = self._prompt[known]
            sums[0].index_add_(0, place, gained)
            sums[1].index_add_(0, place, torch.ones_like(gained))
            for i, predictions in enumerate((before, after)):
                errors[i] += binned(predictions, labels, self._bins).calibration_error
        if not sums[1].any():
            return None
        means = (self._times @ sums[0]) / (self._times @ sums[1])
        low, high = means.nanquantile(torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
        mean = float(sums[0].sum() / sums[1].sum())
        return Gain(mean, low, high, lowers_error=bool(errors[1] <= errors[0]))

    def _survival(self, temperatures: Sequence[float]) -> Tensor:
        return confidence(self._logits[:, : len(temperatures)], temperatures).cumprod(dim=1)
