"""Runs side by side: one row a run, what differs between their configs, and where their figures do
not compare."""

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

from dspark_megatron.config.objective.words import terms_words
from dspark_megatron.errors import require
from dspark_megatron.evaluation.pages.drawing import COLORS, LINES
from dspark_megatron.evaluation.pages.plots import mean_ece
from dspark_megatron.evaluation.pages.run_pages.run_files import Row, RunFiles

MOST_RUNS = len(COLORS) * len(LINES)
"""More cannot be told apart."""
PLACES = ("train.output_dir", "evaluate.output", "evaluate.records")
"""Keys that say where a run writes, not what it does."""
CONDITIONS = ("target", "temperature", "max_new_tokens", "seed", "scheduler")
"""Facts of an evaluation that must be equal for its figures to compare."""
AVERAGE = "moving average"


def check_runs(folders: Sequence[Path]) -> None:
    """ConfigError unless they can be shown on one page."""
    require(
        len(folders) <= MOST_RUNS,
        f"a page shows at most {MOST_RUNS} runs, and {len(folders)} are named; leave some out",
    )
    places = [folder.resolve() for folder in folders]
    twice = {str(f) for f, place in zip(folders, places, strict=True) if places.count(place) > 1}
    require(not twice, f"the same run is named twice: {', '.join(sorted(twice))}; name it once")


def short_names(paths: Sequence[Path | str]) -> list[str]:
    """Paths by their last part, or as many of the last parts as tell them apart."""
    parts = [PurePath(path).parts for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = [str(PurePath(*some[-count:])) for some in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def summary(run: RunFiles) -> dict[str, Any]:
    """The row of a run, by what the columns are called; None for what is not known."""
    figures, before = decoded(run.evaluation), decoded(run.untrained)
    last = run.metrics[-1] if run.metrics else {}
    best = best_heldout(run.heldout)
    survival = (run.calibration or {}).get("survival", {})
    return {
        "run": run.name,
        "steps": _steps(run, last),
        "training tau": last.get("tau"),
        "held-out tau": best and best["tau"],
        "decoded tau": figures.get("tau"),
        "untrained tau": before.get("tau"),
        "evaluated weights": run.evaluation and (AVERAGE if run.is_of_average else "as trained"),
        "accept@0": (figures.get("accept_rate") or [None])[0],
        "ECE before": mean_ece(survival["before"]) if survival else None,
        "ECE after": mean_ece(survival["after"]) if survival else None,
        "greedy identical": _identical(run, figures),
        "target": run.config and PurePath(run.config.target.path).name,
        "objective": run.config and objective(run),
    }


def objective(run: RunFiles) -> str:
    assert run.config is not None
    head = run.config.model.enable_confidence_head
    return terms_words(run.config.loss, with_confidence_head=head)


def decoded(evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """Figures over all prompts of an evaluation; empty where there is none."""
    if evaluation is None:
        return {}
    files = evaluation["files"]
    return files.get("all") or next(iter(files.values()))


def best_heldout(rows: Iterable[Row]) -> Row | None:
    known = [row for row in rows if isinstance(row.get("tau"), float)]
    return max(known, key=lambda row: row["tau"], default=None)


def _steps(run: RunFiles, last: Row) -> str | None:
    planned = run.config and run.config.train.iterations
    reached = last.get("iteration")
    if reached is None and not planned:
        return None
    of = f" of {planned:,}" if planned and planned != reached else ""
    state = f", {run.status}" if run.status and run.status != "completed" else ""
    return f"{reached or 0:,}{of}{state}"


def _identical(run: RunFiles, figures: dict[str, Any]) -> str | None:
    count = figures.get("identical_to_plain")
    if count is None or (run.evaluation or {}).get("temperature") != 0:
        return None
    ties = figures.get("ties_with_plain")
    return f"{count} of {figures['prompts']}" + (f", {ties} ties" if ties else "")


def differing_settings(runs: Sequence[RunFiles]) -> list[list[Any]]:
    """Rows of a key and its value in each run, for keys whose values are not all the same."""
    known = [dict(_flat(run.settings)) for run in runs]
    keys = dict.fromkeys(key for settings in known for key in settings if key not in PLACES)
    rows = [[key, *(settings.get(key, "-") for settings in known)] for key in keys]
    return [
        [key, *map(_value, values)] for key, *values in rows if any(v != values[0] for v in values)
    ]


def _flat(settings: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(value: Any) -> str:
    """As YAML would say it, in one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ", ".join(map(str, value)) or "[]" if isinstance(value, list) else str(value)


def cautions(runs: Sequence[RunFiles]) -> list[str]:
    """Sentences on figures of these runs that do not compare."""
    said = []
    if len({objective(run) for run in runs if run.config}) > 1:
        said.append(
            "The objectives differ, and so do the scales of the loss. Its terms, tau and accept "
            "rates compare."
        )
    said += _differing_weights(runs)
    differ = _differing_conditions([run.evaluation for run in runs if run.evaluation is not None])
    if differ:
        said.append(
            f"The evaluations differ in {', '.join(differ)}, so decoded tau and acceptance do not "
            "compare from run to run."
        )
    for run in runs:
        both = [e for e in (run.untrained, run.evaluation) if e is not None]
        if differ := _differing_conditions(both):
            said.append(
                f"The evaluations of {run.name} before and after training differ in "
                f"{', '.join(differ)}, so they do not compare."
            )
    return said


def _differing_weights(runs: Sequence[RunFiles]) -> list[str]:
    """Figures of the moving average beside those of the weights as trained."""
    decoded = {run.name: run.is_of_average for run in runs if run.evaluation is not None}
    heldout = {run.name: run.heldout_is_of_average for run in runs if run.heldout}
    said = []
    for what, of_average in (("Decoded", decoded), ("Held-out", heldout)):
        average = [name for name, is_average in of_average.items() if is_average]
        trained = [name for name in of_average if name not in average]
        if average and trained:
            said.append(
                f"{what} figures of {', '.join(average)} are of the moving average of the weights, "
                f"those of {', '.join(trained)} of the weights as trained, so they do not compare."
            )
    for name in decoded:
        if name in heldout and decoded[name] != heldout[name]:
            first, second = ("held-out", "decoded") if heldout[name] else ("decoded", "held-out")
            said.append(
                f"Of {name}, {first} figures are of the moving average of the weights and {second} "
                "ones of the weights as trained, so they do not compare."
            )
    return said


def _differing_conditions(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    if not evaluations:
        return []
    first, *others = evaluations
    differ = [
        key.replace("_", " ")
        for key in CONDITIONS
        if any(other.get(key) != first.get(key) for other in others)
    ]
    prompts = [{name: f["prompts"] for name, f in e["files"].items()} for e in evaluations]
    return differ + ["prompts"] * any(found != prompts[0] for found in prompts)
