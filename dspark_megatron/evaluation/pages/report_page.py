"""An evaluation on one self-contained HTML page, from its JSON files alone. Its text is in
`report.html.jinja`, which escapes whatever comes from outside; here are its tables."""

import base64
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from dspark_megatron.evaluation.draft_records import drafted_tokens
from dspark_megatron.evaluation.pages.plots import (
    png,
    reliability_diagram,
    slot_plot,
    threshold_plot,
)
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
    files = _short_names(evaluation["files"])
    facts = {"weights": "trained", **evaluation, "num_draft_tokens": drafted_tokens(evaluation)}
    templates = Environment(
        loader=PackageLoader("dspark_megatron.evaluation", "pages"),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    templates.filters |= {"shown": _shown, "base64": _base64}
    return templates.get_template("report.html.jinja").render(
        title=f"Evaluation of the draft of iteration {_shown(evaluation.get('iteration'))}",
        facts=[[key.replace("_", " "), facts.get(key)] for key in FACTS],
        by_file=_by_file(files),
        with_intervals=any(map(_intervals, files.values())),
        slot_plot=slot_plot(files),
        accept_rate=_by_slot(files, "accept_rate"),
        prefix_survival=_by_slot(files, "prefix_survival"),
        calibration=calibration and _calibration(calibration),
        simulation=simulation and _simulation(simulation),
    )


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


def _calibration(calibration: dict[str, Any]) -> dict[str, Any]:
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
    thresholds = zip(*sweep["after"].values(), strict=True)
    return {
        **calibration,
        "reliability_diagram": reliability_diagram(calibration["survival"]),
        "by_slot": (["slot", *columns], by_slot),
        "threshold_plot": threshold_plot(sweep),
        "by_threshold": (
            [name.replace("_", " ") for name in sweep["after"]],
            [[f"{row[0]:g}", *row[1:]] for row in thresholds],
        ),
    }


def _simulation(figures: list[dict[str, Any]]) -> dict[str, Any]:
    levels = sorted({row["requests"] for row in figures})
    tables: dict[str, Any] = {"serving_plot": serving_plot(figures)}
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
        return _shown(value)
    return f"{_shown(value)}\n{_shown(pair[0])}–{_shown(pair[1])}"


def _shown(value: Any) -> str:
    """A value as text, with the digits that are worth reading."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return str(value)


def _base64(figure: Figure) -> str:
    return base64.b64encode(png(figure)).decode()
