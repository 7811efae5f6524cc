"""Sequential temperature scaling (STS) of the confidence head.

`confidence_j = sigmoid(logit_j / T_j)` is the chance that slot j is kept once all before it were;
`survival_j = prod_{i<=j} confidence_i` that the draft survives up to and with slot j.

Shapes: n rounds, k slots. NaN labels are unknown.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dspark_megatron.errors import require
from dspark_megatron.evaluation.confidence.probability_metrics import binned
from dspark_megatron.evaluation.draft_records import DraftRecords

LABELS = ("observed", "expected")


def survival_labels(records: DraftRecords, kind: str) -> Tensor:
    """fp64 [n, k], of the judged slots; NaN elsewhere.

    `observed`: 1 where the draft survived the slot. `expected`: the chance of that, taken over the
    slot's own token: accept_rate_j where slot j was reached, that is all before it were kept, and 0
    where not. Both have the chance of survival as their mean; the second scatters less.

    The product of accept_rate up to slot j would scatter still less, but is another quantity: it
    weighs the draft's tokens before slot j by the draft's probabilities, while tokens that were
    kept come with those of min(p, q).
    """
    require(kind in LABELS, f"labels must be one of {', '.join(LABELS)}, is {kind!r}")
    judged, reached = records.judged(), _reached(records)
    if kind == "observed":
        labels = records.survived().double()
    else:
        labels = torch.where(reached, records.accept_rate.double(), 0.0)
        missing = int((labels.isnan() & judged).sum())
        require(
            missing == 0,
            f"expected labels need the accept_rate of every slot that was judged and reached, "
            f"{missing} of {int((judged & reached).sum())} have none; use observed labels",
        )
    return labels.masked_fill(~judged, math.nan)


def kept_labels(records: DraftRecords, kind: str) -> Tensor:
    """fp64 [n, k]: whether slot j was kept, or the chance of it, of the slots that were reached;
    NaN elsewhere. See `survival_labels`."""
    return survival_labels(records, kind).masked_fill(~_reached(records), math.nan)


def confidence(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """[n, k] -> fp64 [n, k]."""
    return (logits.double() / torch.tensor(temperatures, dtype=torch.float64)).sigmoid()


def temperature_grid(steps: int = 20, widest: float = 10.0) -> list[float]:
    """Evenly spaced logarithms from 1 / widest to widest, `steps` on each side of exactly 1."""
    return [widest ** (i / steps) for i in range(-steps, steps + 1)]


def fit_temperatures(
    logits: Tensor,
    labels: Tensor,
    grid: Sequence[float],
    bins: int,
    is_kept: Callable[[list[float]], bool] = lambda temperatures: True,
) -> list[float]:
    """Temperatures by slot. From left to right each takes the one of the grid with the smallest
    calibration error of the survival, those before it fixed; of several the nearest to 1. A slot
    whose labels are all unknown, all 0 or all 1 tells nothing and gets 1.

    logits, labels [n, k]: of the confidence head; of the survival. is_kept: whether the last of
    these temperatures of the first slots, which is not 1, is used; if not, the slot gets 1.
    """
    before = torch.ones(len(logits), dtype=torch.float64)
    temperatures: list[float] = []
    for slot_logits, slot_labels in zip(logits.double().T, labels.T, strict=True):
        known = ~slot_labels.isnan()
        best = 1.0
        if two_classes(slot_labels[known]):
            errors = [
                binned(
                    before[known] * (slot_logits[known] / t).sigmoid(), slot_labels[known], bins
                ).calibration_error
                for t in grid
            ]
            best = _nearest_to_one(grid, errors)
        if best != 1 and not is_kept([*temperatures, best]):
            best = 1.0
        temperatures.append(best)
        before = before * (slot_logits / best).sigmoid()
    return temperatures


def two_classes(labels: Tensor) -> bool:
    """Whether some tokens count as kept and some as lost. [n] -> bool"""
    return 0 < float(labels.sum()) < len(labels)


def _nearest_to_one(grid: Sequence[float], errors: Sequence[float]) -> float:
    ties = min(errors) + 1e-12  # rounding of the sums
    tied = [t for t, error in zip(grid, errors, strict=True) if error <= ties]
    return min(tied, key=lambda t: abs(math.log(t)))


def _reached(records: DraftRecords) -> Tensor:
    """[n, k] bool: every slot before was kept."""
    return torch.arange(records.num_draft_tokens) <= records.accepted[:, None]
