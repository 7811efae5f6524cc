"""Curves of one run or several over training: a small picture for each key that was logged."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from dspark_megatron.config.objective.terms import TERMS
from dspark_megatron.evaluation.pages.drawing import (
    INK,
    from_zero,
    legend_beside,
    new_figure,
    ramp,
    series_style,
    style,
    svg,
)
from dspark_megatron.evaluation.pages.run_pages.marks import (
    Marks,
    count_words,
    draw_marks,
    marks_of,
)
from dspark_megatron.evaluation.pages.run_pages.run_files import Row, RunFiles

MOST_POINTS = 400
"""Of a curve; where more steps were logged, a point is the mean of several."""
WIDE_RANGE = 30
"""From this ratio of largest to smallest on, an axis is logarithmic."""
MANY = 10_000
"""From here on numbers of an axis are written with k and M."""
SIZE = (3.4, 2.2)
"""Inches. A page shows one to four such pictures in a row, so they are drawn small."""


@dataclass(frozen=True)
class Picture:
    caption: str
    svg: str


@dataclass(frozen=True)
class Panel:
    key: str
    caption: str
    may_be_log: bool = False
    from_zero: bool = False
    is_marked: bool = False
    """Whether it shows where this figure jumped and steps were skipped."""


PANELS = (
    Panel("loss", "loss", may_be_log=True, is_marked=True),
    *(Panel(f"{term}_loss", f"{term} term", may_be_log=True) for term in TERMS),
    Panel("confidence_loss", "confidence loss", may_be_log=True),
    Panel("confidence_abs_error", "confidence: mean absolute error", from_zero=True),
    Panel("grad_norm", "gradient norm", may_be_log=True, is_marked=True),
    Panel("learning_rate", "learning rate", from_zero=True),
    Panel("tokens_per_second", "tokens per second", from_zero=True),
    Panel("data_wait_share", "share of time waiting for data", from_zero=True),
)


NOT_DRAWN = ("iteration", "consumed_samples", "time", "sampler/")
"""How keys begin that are no figures of the training."""


class Steps:
    """The x-axis that all curves of a page share: steps, or samples where runs take different
    numbers of them in a step."""

    def __init__(self, runs: Iterable[RunFiles]) -> None:
        rows = [row for run in runs for row in run.metrics[-1:]]
        sizes = {_ratio(row.get("consumed_samples"), row["iteration"]) for row in rows}
        differ = len(sizes) > 1 and None not in sizes
        self.key, self.label = ("consumed_samples", "samples") if differ else ("iteration", "step")

    def curve(self, rows: Sequence[Row], key: str, slot: int | None = None) -> "Curve":
        """Of the rows that have a number there; few enough points to be drawn."""
        points = [(row.get(self.key), _value(row, key, slot)) for row in rows]
        known = [(x, y) for x, y in points if is_number(x) and is_number(y)]
        size = math.ceil(len(known) / MOST_POINTS) or 1
        parts = [known[i : i + size] for i in range(0, len(known), size)]
        means = [[sum(column) / len(part) for column in zip(*part, strict=True)] for part in parts]
        return [x for x, _ in means], [y for _, y in means]

    def places(self, rows: Sequence[Row]) -> list[float]:
        return [row[self.key] for row in rows if is_number(row.get(self.key))]


Curve = tuple[list[float], list[float]]
"""x and y."""


def _value(row: Row, key: str, slot: int | None) -> Any:
    value = row.get(key)
    if slot is None:
        return value
    return value[slot] if isinstance(value, list) and slot < len(value) else None


def _ratio(a: Any, b: Any) -> float | None:
    return a / b if is_number(a) and b else None


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def curves(runs: Sequence[RunFiles], panels: Sequence[Panel], steps: Steps) -> list[Picture]:
    """A picture for each key that any run has logged: those of the panels, then the others."""
    rows = [run.metrics for run in runs]
    drawn = []
    for panel in [*panels, *_other_panels(rows, panels)]:
        marks = [marks_of(run, panel.key) for run in runs] if panel.is_marked else []
        drawn.append(_by_run(panel, rows, steps, marks=marks))
    return [picture for picture in drawn if picture is not None]


def _other_panels(rows: Sequence[Sequence[Row]], panels: Sequence[Panel]) -> list[Panel]:
    """For numbers that change in a run and have no panel of their own."""
    known = {panel.key for panel in panels} | {"tau"}
    found: dict[str, bool] = {}
    for of_run in rows:
        for row, first in ((row, of_run[0]) for row in of_run):
            for key in row.keys() - known:
                if is_number(row[key]) and not key.startswith(NOT_DRAWN):
                    found[key] = found.get(key, False) or row[key] != first.get(key)
    return [Panel(key, key.replace("_", " ")) for key in sorted(found) if found[key]]


def acceptance_curves(runs: Sequence[RunFiles], steps: Steps) -> list[Picture]:
    """tau and accept rates, of the data that are trained on and of held-out answers. The accept
    rates are of all slots of one run, or of the first slot of several."""
    pictures = []
    for name, rows in (
        ("training", [run.metrics for run in runs]),
        ("held-out", [run.heldout for run in runs]),
    ):
        first = Panel("accept_rate", f"accept rate of slot 0, {name}")
        pictures += [
            _by_run(Panel("tau", f"tau, {name}"), rows, steps),
            _by_slot(rows[0], name, steps)
            if len(rows) == 1
            else _by_run(first, rows, steps, slot=0),
        ]
    return [picture for picture in pictures if picture is not None]


def _by_run(
    panel: Panel,
    rows: Sequence[Sequence[Row]],
    steps: Steps,
    slot: int | None = None,
    marks: Sequence[Marks] = (),
) -> Picture | None:
    found = [steps.curve(of_run, panel.key, slot) for of_run in rows]
    return _picture(panel, found, [series_style(order) for order in range(len(rows))], steps, marks)


def _by_slot(rows: Sequence[Row], name: str, steps: Steps) -> Picture | None:
    rates = [row["accept_rate"] for row in rows if isinstance(row.get("accept_rate"), list)]
    slots = range(max(map(len, rates), default=0))
    found = [steps.curve(rows, "accept_rate", slot) for slot in slots]
    looks = [{"color": c, "label": str(slot)} for slot, c in enumerate(ramp(len(slots)))]
    return _picture(Panel("accept_rate", f"accept rate by slot, {name}"), found, looks, steps)


def _picture(
    panel: Panel,
    found: Sequence[Curve],
    looks: Sequence[dict[str, Any]],
    steps: Steps,
    marks: Sequence[Marks] = (),
) -> Picture | None:
    """None where there is nothing to draw. looks: of each curve; with labels there is a legend.
    marks: of each curve, if there are any."""
    values = [y for _, of_curve in found for y in of_curve]
    if not values:
        return None
    figure = new_figure(*SIZE)
    axes = figure.subplots()
    for (x, y), look in zip(found, looks, strict=True):
        _line(axes, x, y, **look)
    for of_run, look in zip(marks, looks, strict=False):
        for kind, rows in of_run.items():
            draw_marks(axes, kind, steps.places(rows), look["color"])
    _finish(axes, values, panel, steps)
    if "label" in looks[0]:
        legend_beside(figure, axes, "slot")
    counted = count_words(marks)
    caption = f"{panel.caption} ({counted})" if counted else panel.caption
    return Picture(caption, svg(figure, f"{caption}, by {steps.label}"))


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], **look: Any) -> None:
    marker = {"marker": "o", "markersize": 2.5} if len(x) <= 15 else {}
    axes.plot(x, y, linewidth=1.3, **marker, **look)


def _finish(axes: Axes, values: Sequence[float], panel: Panel, steps: Steps) -> None:
    style(axes, xlabel=steps.label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.may_be_log and min(values) > 0 and max(values) / min(values) > WIDE_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    axes.yaxis.set_major_locator(MaxNLocator(6))
    if panel.from_zero:
        from_zero(axes)
    if max(values) >= MANY:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 9))
        axes.yaxis.get_offset_text().set(fontsize=8, color=INK)
