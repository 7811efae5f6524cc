"""An evaluation on one self-contained HTML page, from its JSON files alone. Its text is in
`parts.jinja`; here are its tables and pictures."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from dspark_megatron.evaluation.draft_records import drafted_tokens
from dspark_megatron.evaluation.pages.drawing import svg
from dspark_megatron.evaluation.pages.plots import reliability_diagram, slot_plot, threshold_plot
from dspark_megatron.evaluation.pages.template import render, shown
from dspark_megatron.evaluation.serving.serving_plot import serving_plot

FACTS = (
    *("target", "checkpoint", "weights", "iteration", "block_size", "num_draft_tokens"),
    *("temperature", "max_new_tokens", "seed", "batch_size", "scheduler"),
)
FILE_COLUMNS = {
    "prompts": "prompts",
    "rounds": "rounds",
    "new_tokens": "new tokens",
    "tau": "tau",
    "estimated_tau": "estimate",
    "verify_rate": "verify rate",
    "tokens_per_second": "tok/s",
    "plain_tokens_per_second": "plain tok/s",
    "speedup": "speed-up",
    "drafts_per_second": "drafts/s",
    "identical_to_plain": "= plain",
}
"""Figures of a prompt file and their headings; one that no file has is left out."""

Table = tuple[list[Any], list[list[Any]]]
"""Headings and rows. Cells: numbers, text, or None for what is not known."""


def report_page(
    evaluation: dict[str, Any],
    calibration: dict[str, Any] | None = None,
    simulation: list[dict[str, Any]] | None = None,
) -> str:
    """The page's HTML. Arguments: what `report_inputs` reads."""
    return render(
        "report.html.jinja",
        title=f"Evaluation of the draft of iteration {shown(evaluation.get('iteration'))}",
        part=evaluation_part(evaluation, calibration, simulation),
    )


def evaluation_part(
    evaluation: dict[str, Any],
    calibration: dict[str, Any] | None,
    simulation: list[dict[str, Any]] | None,
    *,
    run: str = "",
) -> dict[str, Any]:
    """What the macro `evaluation` of `parts.jinja` shows. run: the name of the run whose page it is
    on, which draws reliability, and slots over all prompts, itself."""
    files = _short_names(evaluation["files"])
    facts = {"weights": "trained", **evaluation, "num_draft_tokens": drafted_tokens(evaluation)}
    slots = not run or len(files) > 1
    return {
        "facts": [[key.replace("_", " "), facts.get(key)] for key in FACTS],
        "by_file": _by_file(files),
        "with_intervals": any(map(_intervals, files.values())),
        "slot_plot": svg(slot_plot(files), _of("acceptance by slot", run)) if slots else "",
        "accept_rate": _by_slot(files, "accept_rate"),
        "prefix_survival": _by_slot(files, "prefix_survival"),
        "calibration": calibration and _calibration(calibration, run),
        "simulation": simulation and _simulation(simulation, run),
    }


def _of(picture: str, run: str) -> str:
    return f"{picture} of {run}" if run else picture


def _by_file(files: dict[str, dict[str, Any]]) -> Table:
    for figures in files.values():
        figures["estimated_tau"] = figures.get("estimate", {}).get("tau")
    keys = [key for key in FILE_COLUMNS if any(f.get(key) is not None for f in files.values())]
    rows = [
        [name, *(_with_interval(figures.get(key), _intervals(figures).get(key)) for key in keys)]
        for name, figures in files.items()
    ]
    return ["file", *(FILE_COLUMNS[key] for key in keys)], rows


def _by_slot(files: dict[str, dict[str, Any]], key: str) -> Table:
    rows = []
    for name, figures in files.items():
        values = figures[key]
        pairs = _intervals(figures).get(key) or [None] * len(values)
        rows.append([name, *map(_with_interval, values, pairs)])
    return ["slot", *range(max(map(len, rows)) - 1)], rows


def _calibration(calibration: dict[str, Any], run: str) -> dict[str, Any]:
    before, after = (calibration["survival"][when] for when in ("before", "after"))
    columns = {
        "temperature": calibration["temperatures"],
        "ECE before": before["ece"],
        "ECE after": after["ece"],
        "floor": after["noise_floor"],
        "AUC before": before["auc"],
        "AUC after": after["auc"],
        "Brier before": before["brier"],
        "Brier after": after["brier"],
    }
    by_slot = [[slot, *row] for slot, row in enumerate(zip(*columns.values(), strict=True))]
    sweep = calibration["threshold_sweep"]
    drawn = "" if run else svg(reliability_diagram(calibration["survival"]), "reliability")
    thresholds = zip(*sweep["after"].values(), strict=True)
    return {
        **calibration,
        "reliability_diagram": drawn,
        "by_slot": (["slot", *columns], by_slot),
        "threshold_plot": svg(threshold_plot(sweep), _of("confidence threshold", run)),
        "by_threshold": (
            [name.replace("_", " ") for name in sweep["after"]],
            [[f"{row[0]:g}", *row[1:]] for row in thresholds],
        ),
    }


def _simulation(figures: list[dict[str, Any]], run: str) -> dict[str, Any]:
    levels = sorted({row["requests"] for row in figures})
    tables: dict[str, Any] = {
        "serving_plot": svg(serving_plot(figures), _of("serving simulation", run))
    }
    for key in ("tokens_per_second", "verified"):
        by_policy: dict[str, dict[int, float]] = {}
        for row in figures:
            by_policy.setdefault(row["policy"], {})[row["requests"]] = row[key]
        rows = [[policy, *map(found.get, levels)] for policy, found in by_policy.items()]
        tables[key] = ["policy \\ requests", *levels], rows
    return tables


def _short_names(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Prompt files by their last part, where that tells them apart."""
    short = [PurePath(name).name for name in files]
    names = short if len(set(short)) == len(short) else list(files)
    return dict(zip(names, files.values(), strict=True))


def _intervals(figures: dict[str, Any]) -> dict[str, Any]:
    return figures.get("confidence_intervals") or {}


def _with_interval(value: float | None, pair: Sequence[float | None] | None) -> str:
    if not pair or None in pair:
        return shown(value)
    return f"{shown(value)}\n{shown(pair[0])}–{shown(pair[1])}"
