"""The JSON files that a report is made from, read strictly."""

from pathlib import Path
from typing import Any

from dspark_megatron.bounded_text import read_json
from dspark_megatron.errors import require
from dspark_megatron.evaluation.draft_records import check_same_draft, drafted_tokens

FIGURES = ("prompts", "tau", "accept_rate", "prefix_survival")
"""Without these a file of `evaluation.json` cannot be shown."""
BY_SLOT = ("accept_rate", "prefix_survival")
CALIBRATION = ("labels", "fit", "held_out", "temperatures", "survival", "threshold_sweep", "notes")
SURVIVAL = ("ece", "noise_floor", "auc", "brier", "bin_count", "bin_predicted", "bin_observed")
BINNED = ("bin_count", "bin_predicted", "bin_observed")
WHEN, COUNTED = ("before", "after"), ("rounds", "prompts")
SWEPT = ("threshold", "verified_tokens", "accepted_tokens", "rejected_tokens", "acceptance", "tau")
SIMULATED = {"policy", "requests", "tokens_per_second", "per_request", "tau", "verified", "speedup"}


def read_evaluation(path: Path) -> dict[str, Any]:
    """One `evaluation.json`. ConfigError when it is none."""
    found = read_json(path)
    values = list(found.values())
    together = bool(values) and all(isinstance(value, dict) for value in values)
    require(
        "drafts" not in found,
        f"{path} compares several drafts, and a page of an evaluation is of one; evaluate each "
        "run by itself and name the runs: dspark report RUN RUN",
    )
    require(
        "files" in found or not together,
        f"{path} puts several evaluations together ({', '.join(found)}); give a file that one "
        "evaluation wrote (evaluate.output)",
    )
    files: Any = found.get("files")
    slots: Any = drafted_tokens(found)
    good = isinstance(files, dict) and bool(files) and type(slots) is int
    require(
        good and all(isinstance(figures, dict) for figures in files.values()),
        f"{path} must be an evaluation's JSON, with a block_size and figures by prompt file in "
        f"`files`; it has {sorted(found)}",
    )
    for name, figures in files.items():
        lacking = [key for key in FIGURES if key not in figures]
        require(not lacking, f"{path} has no {', '.join(lacking)} for {name}; evaluate again")
        _check_figures(figures, slots, f"of {name} in {path}")
    return found


def read_calibration(path: Path, evaluation: dict[str, Any]) -> dict[str, Any]:
    """A `calibration.json` of the draft that was evaluated; ConfigError when it is none."""
    found = read_json(path)
    lacking = [key for key in CALIBRATION if key not in found]
    require(
        not lacking,
        f"{path} must be a calibration.json of `dspark calibrate`, lacks {', '.join(lacking)}",
    )
    _check_same_draft(path, found, evaluation)
    slots = drafted_tokens(evaluation)
    times = [(found[key], when) for key in ("survival", "threshold_sweep") for when in WHEN]
    before, after, *swept = [_part(whole, when) for whole, when in times]
    require(
        _are_numbers(found["temperatures"], slots)
        and all(_is_survival(figures, slots) for figures in (before, after))
        and all(_is_sweep(sweep) for sweep in swept),
        f"{path} must have figures before and after calibration for each of the {slots} slots and "
        "each threshold; calibrate again",
    )
    counts = [_part(found, key).get(what) for key in ("fit", "held_out") for what in COUNTED]
    require(
        all(type(count) is int for count in counts) and isinstance(found["notes"], list),
        f"{path} must have numbers of {' and '.join(COUNTED)} in `fit` and `held_out`, and a list "
        "of notes; calibrate again",
    )
    return found


def _part(whole: Any, key: str) -> dict[str, Any]:
    part = whole.get(key) if isinstance(whole, dict) else None
    return part if isinstance(part, dict) else {}


def _is_survival(figures: dict[str, Any], slots: int) -> bool:
    bins: list[Any] = [figures.get(key) for key in BINNED]
    if not all(isinstance(rows, list) and len(rows) == slots for rows in bins):
        return False
    rows = [row for rows in bins for row in rows]
    count = len(rows[0]) if isinstance(rows[0], list) else 0
    return (
        all(_are_numbers(figures.get(key), slots) for key in SURVIVAL if key not in BINNED)
        and count > 0
        and all(_are_numbers(row, count) for row in rows)
        and all(type(number) is int for row in figures["bin_count"] for number in row)
    )


def _is_sweep(figures: dict[str, Any]) -> bool:
    first = figures.get(SWEPT[0])
    count = len(first) if isinstance(first, list) else 0
    return figures.keys() == set(SWEPT) and all(
        _are_numbers(values, count) and (key == "acceptance" or None not in values)
        for key, values in figures.items()
    )


def _check_same_draft(path: Path, found: dict[str, Any], evaluation: dict[str, Any]) -> None:
    check_same_draft(
        found,
        evaluation,
        lambda key, mine, wanted: (
            f"{path} is of another draft than the evaluation: {key} is {mine!r} and {wanted!r}; "
            "give one of the evaluated draft"
        ),
    )


def read_simulation(path: Path, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Figures of a serving simulation by requests and policy; ConfigError when it is none, or of
    another draft than the one that was evaluated."""
    found = read_json(path)
    figures: Any = found.get("figures")
    good = isinstance(figures, list) and bool(figures)
    require(
        good and all(isinstance(row, dict) and row.keys() >= SIMULATED for row in figures),
        f"{path} must be the JSON of `dspark served simulate`, with a list `figures` of "
        f"{', '.join(sorted(SIMULATED))}",
    )
    for row in figures:
        require(
            _are_numbers([row[key] for key in SIMULATED - {"policy"}], len(SIMULATED) - 1),
            f"the figures in {path} must be numbers, are {row}",
        )
    _check_same_draft(path, found.get("drafts", {}), evaluation)
    return figures


def _check_figures(figures: dict[str, Any], slots: int, where: str) -> None:
    require(_are_numbers([figures["tau"]], 1), f"tau {where} must be a number or null")
    for key in BY_SLOT:
        require(
            _are_numbers(figures[key], slots),
            f"{key} {where} must have a number or null for each of the {slots} slots, is "
            f"{figures[key]}",
        )
    intervals: Any = figures.get("confidence_intervals") or {}
    require(
        isinstance(intervals, dict),
        f"the confidence intervals {where} must be an object, are {intervals}",
    )
    for key, ends in intervals.items():
        pairs = ends if key in BY_SLOT else [ends]
        count = slots if key in BY_SLOT else 1
        require(
            isinstance(pairs, list)
            and len(pairs) == count
            and all(pair is None or _are_numbers(pair, 2) for pair in pairs),
            f"the confidence interval of {key} {where} must be [low, high], for figures by slot "
            f"one for each of the {slots} slots; it is {ends}",
        )


def _are_numbers(values: Any, count: int) -> bool:
    """Whether it is a list of so many numbers or nulls."""
    kinds = (int, float, type(None))
    right = isinstance(values, list) and len(values) == count
    return right and all(type(value) in kinds for value in values)
