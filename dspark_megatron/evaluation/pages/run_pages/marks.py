"""Steps of a run that went wrong, marked in its curves: spikes, and steps that were skipped."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from dspark_megatron.evaluation.pages.run_pages.run_files import Row, RunFiles

LOOKS = {"spike": ("-", "v"), "skipped step": (":", "x")}
"""Kinds of marks: the line, and the sign at its top."""
MOST_MARKS = 100
"""Of one kind in one picture, which has no room for more."""

Marks = dict[str, list[Row]]
"""Rows by kind."""


def marks_of(run: RunFiles, key: str | None = None) -> Marks:
    """key: the figure whose spikes are meant; None for those of any."""
    spikes = [row for row in run.metrics if _jumped(row, key)]
    return {"spike": spikes, "skipped step": run.skipped}


def _jumped(row: Row, key: str | None) -> bool:
    named = row.get("spike")
    return isinstance(named, list) and (bool(named) if key is None else key in named)


def count_words(marks: Sequence[Marks]) -> str:
    """How many there are of each kind: `2 spikes, 1 skipped step`; empty where there are none."""
    counts = {kind: sum(len(of_run[kind]) for of_run in marks) for kind in LOOKS}
    words = [f"{count:,} {kind}{'s' * (count > 1)}" for kind, count in counts.items() if count]
    return ", ".join(words)


def draw_marks(axes: Axes, kind: str, places: Sequence[float], color: str) -> None:
    """Thin vertical lines at these places of the x-axis, with a sign at the top of each."""
    line, sign = LOOKS[kind]
    room = max(places, default=0) / MOST_MARKS or 1
    distinct = list({int(place / room): place for place in places}.values())
    over = axes.get_xaxis_transform()  # from 0 to 1 is from bottom to top
    ends = [[(place, 0.0), (place, 1.0)] for place in distinct]
    look = {"colors": color, "linewidths": 0.8, "linestyles": line, "alpha": 0.7, "zorder": 1}
    axes.add_collection(LineCollection(ends, transform=over, **look), autolim=False)
    tops = [1.04] * len(distinct)
    axes.plot(distinct, tops, sign, markersize=4, color=color, transform=over, clip_on=False)
