"""Calibration of the confidence head: temperatures fitted on one part of the prompts, figures of
another part before and after them.

Shapes: n rounds, k slots.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dspark_megatron.errors import require
from dspark_megatron.evaluation.confidence.calibration_gain import GainJudge
from dspark_megatron.evaluation.confidence.calibration_records import split_by_prompt
from dspark_megatron.evaluation.confidence.chosen_temperatures import choose_temperatures
from dspark_megatron.evaluation.confidence.probability_metrics import (
    auc,
    binned,
    brier,
    noise_floor,
)
from dspark_megatron.evaluation.confidence.temperature_scaling import (
    LABELS,
    confidence,
    kept_labels,
    survival_labels,
    temperature_grid,
    two_classes,
)
from dspark_megatron.evaluation.confidence.threshold_sweep import threshold_sweep
from dspark_megatron.evaluation.draft_records import DraftRecords


@dataclass(frozen=True)
class CalibrationSettings:
    labels: str = "observed"
    """`observed` or `expected`; see `survival_labels`."""
    bins: int = 20
    """Of equal width, for the calibration error."""
    fit_share: float = 0.5
    """Share of the prompts that the temperatures are fitted on; figures are of the others."""
    widest_temperature: float = 10.0
    """The grid goes from its inverse to it."""
    seed: int = 0
    """Of the split, and of the noise floor's labels."""

    def __post_init__(self) -> None:
        require(
            self.labels in LABELS, f"labels must be one of {', '.join(LABELS)}, is {self.labels!r}"
        )
        require(self.bins >= 2, f"bins must be at least 2, is {self.bins}")
        require(0 < self.fit_share < 1, f"fit_share must be between 0 and 1, is {self.fit_share}")
        require(
            1 < self.widest_temperature < math.inf,
            f"widest_temperature must be above 1, is {self.widest_temperature}",
        )


def calibrate(records: DraftRecords, settings: CalibrationSettings) -> dict[str, Any]:
    """All that `calibration.json` holds; a figure with nothing to count is null.

    By slot: `temperatures`, of which the part held out has shown that they are better than 1, and
    `fitted_temperatures`; `survival` and `confidence` before and after them, on the part held
    out. `threshold_sweep`: of the part held out.
    """
    fit, held_out = split_by_prompt(records, settings.fit_share, settings.seed)
    fit_labels = survival_labels(fit, settings.labels)
    grid = temperature_grid(widest=settings.widest_temperature)
    labels = survival_labels(held_out, settings.labels)
    judge = GainJudge(held_out.confidence_logits, labels, held_out.prompt, settings.bins)
    chosen = choose_temperatures(fit.confidence_logits, fit_labels, grid, settings.bins, judge)
    temperatures = chosen.temperatures
    ones = [1.0] * records.num_draft_tokens
    result: dict[str, Any] = {
        **records.facts,
        "labels": settings.labels,
        "bins": settings.bins,
        "seed": settings.seed,
        "fit": _size(fit),
        "held_out": _size(held_out),
        "temperatures": temperatures,
        "fitted_temperatures": chosen.fitted,
        "verdict": chosen.verdict,
        "notes": [*chosen.notes, *_notes(fit_labels, labels, temperatures, grid)],
        "survival": {},
        "confidence": {},
        "threshold_sweep": {},
    }
    for when, used in (("before", ones), ("after", temperatures)):
        per_slot = confidence(held_out.confidence_logits, used)
        for name, predictions, known in (
            ("survival", per_slot.cumprod(dim=1), labels),
            ("confidence", per_slot, kept_labels(held_out, settings.labels)),
        ):
            result[name][when] = _figures(predictions, known, settings)
        result["threshold_sweep"][when] = threshold_sweep(held_out, used)
    return result


def _figures(
    predictions: Tensor, labels: Tensor, settings: CalibrationSettings
) -> dict[str, list[Any]]:
    """Figures by slot, over the rounds whose label is known. predictions, labels [n, k]."""
    slots = [
        _slot_figures(p[~y.isnan()], y[~y.isnan()], settings)
        for p, y in zip(predictions.T, labels.T, strict=True)
    ]
    return {name: [figures[name] for figures in slots] for name in slots[0]}


def _slot_figures(
    predictions: Tensor, labels: Tensor, settings: CalibrationSettings
) -> dict[str, Any]:
    bins = binned(predictions, labels, settings.bins)
    return {
        "rounds": len(labels),
        "predicted": _number(predictions.mean()),
        "observed": _number(labels.mean()),
        "ece": _number(bins.calibration_error),
        "noise_floor": _number(noise_floor(predictions, settings.bins, seed=settings.seed)),
        "auc": _number(auc(predictions, labels)),
        "brier": _number(brier(predictions, labels)),
        "bin_count": bins.count.tolist(),
        "bin_predicted": [_number(x) for x in bins.predicted / bins.count],
        "bin_observed": [_number(x) for x in bins.observed / bins.count],
    }


def _notes(
    fit_labels: Tensor, labels: Tensor, temperatures: Sequence[float], grid: Sequence[float]
) -> list[str]:
    """What a reader of the figures must know. fit_labels, labels [n, k]: of either part."""
    notes = []
    for slot, temperature in enumerate(temperatures):
        for y, part, effect in (
            (fit_labels[:, slot], "fitted on", "its temperature stays 1"),
            (labels[:, slot], "held out", "it has no AUC"),
        ):
            known = y[~y.isnan()]
            if not two_classes(known):
                notes.append(f"slot {slot}: {_outcome(known)} in the part {part}; {effect}")
        if temperature in (grid[0], grid[-1]):
            notes.append(f"slot {slot}: temperature {temperature:g} is at the edge of the grid")
    return notes


def _outcome(labels: Tensor) -> str:
    """What a slot's labels have in common, when they are of one class."""
    if not len(labels):
        return "no known outcome"
    return f"{'only' if labels[0] else 'no'} surviving drafts ({len(labels)} rounds)"


def _size(records: DraftRecords) -> dict[str, int]:
    return {"prompts": len(records.prompt.unique()), "rounds": len(records)}


def _number(value: float | Tensor) -> float | None:
    value = float(value)
    return None if math.isnan(value) else value
