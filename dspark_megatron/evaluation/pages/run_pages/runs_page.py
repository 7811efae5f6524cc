"""One run or several on one self-contained HTML page. Its text is in `runs.html.jinja`."""

from collections.abc import Sequence
from typing import Any

from dspark_megatron.evaluation.pages.drawing import series_style, themed
from dspark_megatron.evaluation.pages.report_page import evaluation_part
from dspark_megatron.evaluation.pages.run_pages.comparison import (
    cautions,
    differing_settings,
    short_names,
    summary,
)
from dspark_megatron.evaluation.pages.run_pages.curves import (
    MOST_POINTS,
    PANELS,
    Steps,
    acceptance_curves,
    curves,
)
from dspark_megatron.evaluation.pages.run_pages.marks import count_words, marks_of
from dspark_megatron.evaluation.pages.run_pages.outcomes import (
    MOST_WITH_INTERVALS,
    before_and_after,
    calibration_pictures,
    last_rates,
    slot_pictures,
)
from dspark_megatron.evaluation.pages.run_pages.run_files import RunFiles
from dspark_megatron.evaluation.pages.template import render


def name_runs(runs: Sequence[RunFiles]) -> None:
    """Give each the name that the page calls it by."""
    for run, name in zip(runs, short_names([run.folder.resolve() for run in runs]), strict=True):
        run.name = name


def runs_page(runs: Sequence[RunFiles]) -> str:
    """The page's HTML. runs: named by `name_runs`."""
    steps = Steps(runs)
    rows = [summary(run) for run in runs]
    several = len(runs) > 1
    return render(
        "runs.html.jinja",
        title=f"{len(runs)} runs compared" if several else f"Run {runs[0].name}",
        legend=[_legend(order, run) for order, run in enumerate(runs)] if several else [],
        summary=(list(rows[0]), [list(row.values()) for row in rows]),
        cautions=cautions(runs),
        settings=(["key", *(run.name for run in runs)], differing_settings(runs)),
        training=[*acceptance_curves(runs, steps), *curves(runs, PANELS, steps)],
        marked=[(run.name, words) for run in runs if (words := count_words([marks_of(run)]))],
        thinned=any(len(run.metrics) > MOST_POINTS for run in runs),
        most_points=MOST_POINTS,
        with_intervals=len(runs) <= MOST_WITH_INTERVALS,
        outcomes=[*before_and_after(runs), *slot_pictures(runs), *last_rates(runs)],
        calibration=calibration_pictures(runs),
        runs=[{"name": run.name, "notes": run.notes, "part": _part(run)} for run in runs],
    )


def _legend(order: int, run: RunFiles) -> tuple[str, str, str]:
    """Colour and border of the mark, and the run's name."""
    look = series_style(order)
    border = {"-": "solid", "--": "dashed", ":": "dotted"}[look["linestyle"]]
    return themed(look["color"]), border, run.name


def _part(run: RunFiles) -> dict[str, Any] | None:
    if run.evaluation is None:
        return None
    return evaluation_part(run.evaluation, run.calibration, run.simulation, run=run.name)
