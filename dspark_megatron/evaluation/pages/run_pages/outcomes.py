"""What came out of runs: acceptance by slot, before and after training, and calibration."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_megatron.evaluation.pages.drawing import (
    FAINT,
    INK,
    from_zero,
    gaps,
    legend_beside,
    new_figure,
    ramp,
    series_style,
    style,
    svg,
)
from dspark_megatron.evaluation.pages.plots import mean_ece, reliability_line, slot_line
from dspark_megatron.evaluation.pages.run_pages.comparison import decoded
from dspark_megatron.evaluation.pages.run_pages.curves import SIZE, Picture, is_number
from dspark_megatron.evaluation.pages.run_pages.run_files import RunFiles

BY_SLOT = {
    "accept_rate": "accepted, of those reached",
    "prefix_survival": "survived with all slots before",
}
_APART = 0.06
"""Slots between the intervals of two runs."""
MOST_WITH_INTERVALS = 4
"""Runs; with more of them the bars would hide the lines."""


def slot_pictures(runs: Sequence[RunFiles]) -> list[Picture]:
    """Decoded acceptance by slot, dotted for the untrained draft."""
    pictures = []
    crowded = len(runs) > MOST_WITH_INTERVALS
    for key, caption in BY_SLOT.items():
        figure, axes = _panel()
        for order, run in enumerate(runs):
            offset = 0 if crowded else _APART * (order - (len(runs) - 1) / 2)
            look = series_style(order)
            for evaluation, line in (
                (run.untrained, {"linestyle": ":", "alpha": 0.6}),
                (run.evaluation, {}),
            ):
                if evaluation is not None:
                    bars = {"confidence_intervals": None} if crowded else {}
                    slot_line(axes, decoded(evaluation) | bars, key, offset, **look | line)
        if axes.containers:
            pictures.append(_by_slot(figure, axes, caption))
    return pictures


def last_rates(runs: Sequence[RunFiles]) -> list[Picture]:
    """Accept rates of the last logged steps, which every run with a curve has."""
    figure, axes = _panel()
    for order, run in enumerate(runs):
        rates = run.metrics[-1].get("accept_rate") if run.metrics else None
        if isinstance(rates, list) and any(map(is_number, rates)):
            known = [rate if is_number(rate) else None for rate in rates]
            axes.plot(gaps(known), marker="o", markersize=3, linewidth=1.2, **series_style(order))
    return [_by_slot(figure, axes, "accept rate at the end of training")] if axes.lines else []


def _by_slot(figure: Figure, axes: Axes, caption: str) -> Picture:
    style(axes, xlabel="slot")
    from_zero(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return Picture(caption, svg(figure, caption))


def before_and_after(runs: Sequence[RunFiles]) -> list[Picture]:
    """Decoded tau of each run, untrained and trained, with its confidence interval."""
    figure = new_figure(SIZE[0], max(SIZE[1], 0.35 * len(runs)))
    axes, shown = figure.subplots(), []
    for order, run in enumerate(runs):
        before, after = (decoded(e).get("tau") for e in (run.untrained, run.evaluation))
        if before is None or after is None:
            continue
        color = series_style(order)["color"]
        interval = (decoded(run.evaluation).get("confidence_intervals") or {}).get("tau")
        axes.plot([before, after], [order, order], color=FAINT, linewidth=3, zorder=1)
        if interval and None not in interval:
            axes.plot(interval, [order, order], color=color, linewidth=1.2)
        axes.plot(before, order, "o", markersize=5, markerfacecolor="none", color=color)
        axes.plot(after, order, "o", markersize=6, color=color)
        axes.annotate(
            f"{before:.2f} to {after:.2f}",
            ((before + after) / 2, order),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
        )
        shown.append(order)
    if not shown:
        return []
    style(axes, xlabel="tau")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(max(shown) + 0.6, min(shown) - 0.8)  # the first run above
    axes.margins(x=0.12)
    caption = "decoded tau before and after"
    return [Picture(caption, svg(figure, caption))]


def calibration_pictures(runs: Sequence[RunFiles]) -> list[Picture]:
    """Calibration error by slot of all runs, and for each run predicted against observed survival,
    before and after calibration."""
    known = [
        (order, run, run.calibration["survival"])
        for order, run in enumerate(runs)
        if run.calibration
    ]
    if not known:
        return []
    figure, axes = _panel()
    for order, _, survival in known:
        look = series_style(order)
        for when, line in (("before", {"linestyle": ":"}), ("after", {})):
            values = gaps(survival[when]["ece"])
            axes.plot(values, marker="o", markersize=3, linewidth=1.2, **look | line)
    errors = _by_slot(figure, axes, "calibration error by slot")
    return [
        errors,
        *(
            _reliability(f"{run.name}, {when} calibration", survival[when])
            for _, run, survival in known
            for when in ("before", "after")
        ),
    ]


def _reliability(name: str, survival: dict[str, Any]) -> Picture:
    figure, axes = _panel()
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, zorder=1)
    for slot, color in enumerate(ramp(len(survival["ece"]))):
        reliability_line(axes, survival, slot, color)
    style(axes, xlabel="predicted survival", limits=(0, 1))
    axes.set_ylabel("observed")
    legend_beside(figure, axes, "slot")
    error = mean_ece(survival)
    caption = name if error is None else f"{name}: ECE {100 * error:.1f}%"
    return Picture(caption, svg(figure, f"reliability of {caption}"))


def _panel() -> tuple[Figure, Axes]:
    figure = new_figure(*SIZE)
    return figure, figure.subplots()
