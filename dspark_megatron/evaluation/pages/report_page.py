"""An evaluation on one self-contained HTML page, from its JSON files alone."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from dspark_megatron.evaluation.pages.page_parts import (
    page,
    paragraph,
    picture,
    section,
    shown,
    table,
)
from dspark_megatron.evaluation.pages.plots import reliability_diagram, slot_plot, threshold_plot
from dspark_megatron.evaluation.serving.serving_plot import serving_plot

FACTS = (
    *("target", "checkpoint", "iteration", "block_size", "temperature", "max_new_tokens"),
    *("seed", "batch_size", "scheduler"),
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
SLOT_TABLES = {
    "accept_rate": "Share of a slot's tokens that were kept, of those whose predecessors were.",
    "prefix_survival": "Share of the proposals whose tokens up to and with a slot were all kept.",
}
SIMULATION_TABLES = {
    "tokens_per_second": "Tokens per second of all requests served at once.",
    "verified": "Draft slots of a request that are verified in a step.",
}


def report_page(
    evaluation: dict[str, Any],
    calibration: dict[str, Any] | None = None,
    simulation: list[dict[str, Any]] | None = None,
) -> str:
    """The page's HTML. Arguments: what `report_inputs` reads."""
    files = _short_names(evaluation["files"])
    for figures in files.values():
        figures["estimated_tau"] = figures.get("estimate", {}).get("tau")
    facts = [[key.replace("_", " "), evaluation.get(key)] for key in FACTS]
    parts = [table([], facts), _by_file(files), _by_slot(files)]
    if calibration is not None:
        parts += [_calibration(calibration), _sweep(calibration["threshold_sweep"])]
    if simulation is not None:
        parts.append(_simulation(simulation))
    return page(
        f"Evaluation of the draft of iteration {shown(evaluation.get('iteration'))}", *parts
    )


def _by_file(files: dict[str, dict[str, Any]]) -> str:
    keys = [key for key in FILE_COLUMNS if any(f.get(key) is not None for f in files.values())]
    rows = [[name, *(_of_file(figures, key) for key in keys)] for name, figures in files.items()]
    note = (
        "tau: tokens gained in a round of drafting and verifying, bonus token included. estimate: "
        "the same, told from the answers without generation."
    )
    if any(map(_intervals, files.values())):
        note += " Below a figure: its confidence interval."
    headings = ["file", *(FILE_COLUMNS[key] for key in keys)]
    return section("Prompt files", table(headings, rows), paragraph(note))


def _by_slot(files: dict[str, dict[str, Any]]) -> str:
    parts = [picture(slot_plot(files), "acceptance and survival by slot")]
    for key, meaning in SLOT_TABLES.items():
        slots = max(len(figures[key]) for figures in files.values())
        rows = [[name, *_of_slots(figures, key)] for name, figures in files.items()]
        parts += [paragraph(meaning), table(["slot", *range(slots)], rows)]
    return section("Acceptance by slot", *parts)


def _calibration(calibration: dict[str, Any]) -> str:
    before, after = (calibration["survival"][when] for when in ("before", "after"))
    columns = [
        ("temperature", calibration["temperatures"]),
        ("ECE before", before["ece"]),
        ("after", after["ece"]),
        ("floor", after["noise_floor"]),
        ("AUC before", before["auc"]),
        ("after", after["auc"]),
        ("Brier before", before["brier"]),
        ("after", after["brier"]),
    ]
    by_slot = zip(*(figures for _, figures in columns), strict=True)
    rows = [[slot, *row] for slot, row in enumerate(by_slot)]
    fit, held_out = calibration["fit"], calibration["held_out"]
    note = (
        f"Of the survival up to and with a slot ({calibration['labels']} labels). Temperatures "
        f"fitted on {fit['rounds']} rounds of {fit['prompts']} prompts; figures of "
        f"{held_out['rounds']} rounds of {held_out['prompts']} others. An ECE near the floor, that "
        "of exactly calibrated predictions on as many rounds, cannot be told from 0."
    )
    return section(
        "Calibration of the confidence head",
        picture(reliability_diagram(calibration["survival"]), "reliability diagram"),
        table(["slot", *(head for head, _ in columns)], rows),
        *map(paragraph, [note, *calibration["notes"]]),
    )


def _sweep(sweep: dict[str, Any]) -> str:
    after = sweep["after"]
    rows = [[f"{row[0]:g}", *row[1:]] for row in zip(*after.values(), strict=True)]
    return section(
        "Confidence threshold",
        paragraph("Each draft cut at the first slot whose confidence is below the threshold."),
        picture(threshold_plot(sweep), "threshold sweep"),
        paragraph("After calibration:"),
        table([name.replace("_", " ") for name in after], rows),
    )


def _simulation(figures: list[dict[str, Any]]) -> str:
    levels = sorted({row["requests"] for row in figures})
    parts = [picture(serving_plot(figures), "throughput and verified slots by requests")]
    for key, meaning in SIMULATION_TABLES.items():
        by_policy: dict[str, dict[int, float]] = {}
        for row in figures:
            by_policy.setdefault(row["policy"], {})[row["requests"]] = row[key]
        rows = [[policy, *map(found.get, levels)] for policy, found in by_policy.items()]
        parts += [paragraph(meaning), table(["policy \\ requests", *levels], rows)]
    return section("Serving simulation", *parts)


def _short_names(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Prompt files by their last part, where that tells them apart."""
    short = [PurePath(name).name for name in files]
    names = short if len(set(short)) == len(short) else list(files)
    return dict(zip(names, files.values(), strict=True))


def _intervals(figures: dict[str, Any]) -> dict[str, Any]:
    return figures.get("confidence_intervals") or {}


def _of_file(figures: dict[str, Any], key: str) -> str:
    return _with_interval(figures.get(key), _intervals(figures).get(key))


def _of_slots(figures: dict[str, Any], key: str) -> list[str]:
    values = figures[key]
    pairs = _intervals(figures).get(key) or [None] * len(values)
    return [_with_interval(value, pair) for value, pair in zip(values, pairs, strict=True)]


def _with_interval(value: float | None, pair: Sequence[float | None] | None) -> str:
    if not pair or None in pair:
        return shown(value)
    return f"{shown(value)}\n{shown(pair[0])}–{shown(pair[1])}"
