"""Pictures of an evaluation as Matplotlib figures, from the figures in its JSON files."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_megatron.evaluation.pages.drawing import (
    BLUE,
    FAINT,
    INK,
    gaps,
    legend,
    new_figure,
    plain,
    ramp,
    series_style,
    style,
)

FEW = 20
"""Bins with fewer rounds are drawn faint."""


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144)
    return file.getvalue()


def reliability_diagram(survival: dict[str, Any]) -> Figure:
    """Predicted against observed survival by slot, before and after calibration, and how many
    predictions each bin has. survival: that of `calibrate`."""
    figure = new_figure(8.4, 5.2)
    panels = figure.subplots(
        2, 2, sharex=True, sharey="row", gridspec_kw={"height_ratios": [3.2, 1]}
    )
    for (upper, lower), when in zip(panels.T, ("before", "after"), strict=True):
        figures = survival[when]
        colors = ramp(len(figures["ece"]))
        upper.plot([0, 1], [0, 1], color=FAINT, linewidth=1, zorder=1)
        for slot, color in enumerate(colors):
            reliability_line(upper, figures, slot, color)
        mean = mean_ece(figures)
        error = "" if mean is None else f"ECE {100 * mean:.1f}% (mean of slots)"
        style(upper, title=f"{when} calibration: {error}", limits=(0, 1))
        _counts(lower, figures["bin_count"], colors)
        style(lower, xlabel="predicted survival", title="")
    panels[0, 0].set_ylabel("observed survival")
    panels[1, 0].set_ylabel("predictions")
    legend(panels[0, 1], "slot")
    return figure


def threshold_plot(sweep: dict[str, Any]) -> Figure:
    """Acceptance, tau and draft tokens by confidence threshold, before and after calibration.
    sweep: that of `calibrate`."""
    figure = new_figure(8.4, 3.0)
    shares, lengths, tokens = figure.subplots(1, 3)
    for when, line in (("before", ":"), ("after", "-")):
        figures = sweep[when]
        x, label = figures["threshold"], f"{when} calibration"
        shares.plot(x, gaps(figures["acceptance"]), line, color=BLUE, label=label)
        lengths.plot(x, figures["tau"], line, color=BLUE)
    after = sweep["after"]
    accepted, rejected = after["accepted_tokens"], after["rejected_tokens"]
    tokens.stackplot(
        after["threshold"],
        accepted,
        rejected,
        colors=[BLUE, FAINT],
        labels=["accepted", "rejected"],
    )
    style(shares, title="acceptance of verified tokens", xlabel="threshold")
    style(lengths, title="tau", xlabel="threshold")
    style(tokens, title="draft tokens, after calibration", xlabel="threshold")
    for axes, low in ((shares, 0), (lengths, 1), (tokens, 0)):
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=low)
    for axes in (shares, tokens):
        legend(axes)
    return figure


def slot_plot(files: dict[str, dict[str, Any]]) -> Figure:
    """Acceptance and survival by slot, a line for each prompt file, with confidence intervals where
    the evaluation has them. files: figures by name, as in `evaluation.json`."""
    figure = new_figure(8.4, 3.2)
    titles = {
        "accept_rate": "accepted, of those reached",
        "prefix_survival": "survived with all slots before",
    }
    step = 0.06 if any(figures.get("confidence_intervals") for figures in files.values()) else 0
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for i, (file, figures) in enumerate(files.items()):
            offset = step * (i - (len(files) - 1) / 2)
            slot_line(axes, figures, name, offset, label=file, **series_style(i))
        style(axes, title=title, xlabel="slot")
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(
        lines, names, loc="outside lower center", ncols=4, fontsize=7, frameon=False, labelcolor=INK
    )
    return figure


def mean_ece(survival: dict[str, Any]) -> float | None:
    """Calibration error over all slots of which it is known. survival: before or after."""
    known = [x for x in survival["ece"] if x is not None]
    return sum(known) / len(known) if known else None


def reliability_line(axes: Axes, figures: dict[str, Any], slot: int, color: Any) -> None:
    counts, x, y = (figures[name][slot] for name in ("bin_count", "bin_predicted", "bin_observed"))
    enough = [i for i, count in enumerate(counts) if count >= FEW]
    few = [i for i, count in enumerate(counts) if 0 < count < FEW]
    axes.plot([x[i] for i in few], [y[i] for i in few], ".", color=color, alpha=0.25, markersize=3)
    axes.plot(
        [x[i] for i in enough],
        [y[i] for i in enough],
        color=color,
        marker="o",
        markersize=2.5,
        linewidth=1,
        label=str(slot),
    )


def slot_line(
    axes: Axes, figures: dict[str, Any], name: str, offset: float, *, label: str = "", **line: Any
) -> None:
    """offset: of the slots, so that the intervals of several files stay apart. line: its looks."""
    values = gaps(figures[name])
    axes.errorbar(
        [slot + offset for slot in range(len(values))],
        values,
        yerr=_errors(values, (figures.get("confidence_intervals") or {}).get(name)),
        label=plain(label),
        marker="o",
        markersize=3,
        linewidth=1.2,
        elinewidth=0.8,
        capsize=2,
        **line,
    )


def _counts(axes: Axes, counts: Sequence[Sequence[int]], colors: Sequence[Any]) -> None:
    """Bars by bin, the slots on each other."""
    bins = len(counts[0])
    edges = [i / bins for i in range(bins)]
    bottom = [0] * bins
    for slot_counts, color in zip(counts, colors, strict=True):
        axes.bar(edges, slot_counts, 1 / bins, bottom, align="edge", color=color)
        bottom = [a + b for a, b in zip(bottom, slot_counts, strict=True)]


def _errors(
    values: Sequence[float], intervals: Sequence[Sequence[float] | None] | None
) -> list[list[float]] | None:
    """Distances of [low, high] from the values, as errorbar wants them."""
    if intervals is None:
        return None
    pairs = zip(values, intervals, strict=True)
    ends = [pair if pair and None not in pair else (v, v) for v, pair in pairs]
    low = [max(v - low, 0) for v, (low, _) in zip(values, ends, strict=True)]
    high = [max(high - v, 0) for v, (_, high) in zip(values, ends, strict=True)]
    return [low, high]
