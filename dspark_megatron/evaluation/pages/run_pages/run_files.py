"""What a run's folder holds for a report: each file that is there, and for each that is missing or
cannot be shown a line that says so, with the command that makes it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark_megatron.bounded_text import MOST_YAML_BYTES, parse_yaml, read_text
from dspark_megatron.config import Config
from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.evaluation.pages.report_inputs import (
    read_calibration,
    read_evaluation,
    read_simulation,
)
from dspark_megatron.evaluation.pages.run_pages.commands import UNTRAINED, Commands
from dspark_megatron.storage.checkpoints.named import NamedCheckpoint

ANY_OF = ("config.yaml", "metrics.jsonl", "evaluation.json")
"""A folder with none of them is no run's."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Note:
    """Something that a reader must know."""

    text: str
    command: str = ""
    """What mends it."""


@dataclass
class RunFiles:
    folder: Path
    name: str = ""
    config: Config | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """`config.yaml` as it was written."""
    status: str = ""
    metrics: list[Row] = field(default_factory=list)
    heldout: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)
    """Steps that were not taken: where they are, and nothing else of them."""
    evaluation: dict[str, Any] | None = None
    untrained: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    simulation: list[dict[str, Any]] | None = None
    notes: list[Note] = field(default_factory=list)

    def say(self, text: str, command: str = "") -> None:
        self.notes.append(Note(text, command))

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def is_of_average(self) -> bool:
        """Whether it was the moving average of the weights that was evaluated."""
        named = NamedCheckpoint.of_facts(self.evaluation or {})
        return named is not None and named.weights == "ema"

    @property
    def heldout_is_of_average(self) -> bool:
        """The same of the estimates while it trained, which go by the config."""
        return self.config is not None and self.config.evaluate.weights == "ema"

    @property
    def commands(self) -> Commands:
        completed = self.status == "completed"
        return Commands(self.folder, self.config, completed, self.is_of_average)


def read_run(
    folder: Path, calibration: Path | None = None, simulation: Path | None = None
) -> RunFiles:
    """ConfigError unless it is a run's folder. calibration, simulation: files that lie elsewhere,
    which must then be good."""
    require(folder.is_dir(), f"there is no folder {folder}; name that of a run (train.output_dir)")
    require(
        any((folder / name).exists() for name in ANY_OF),
        f"{folder} is no run's folder: it has none of {', '.join(ANY_OF)}; name a train.output_dir",
    )
    run = RunFiles(folder)
    _read_settings(run)
    _read_rows(run)
    _read_evaluations(run)
    _read_calibration(run, calibration)
    _read_simulation(run, simulation)
    return run


def _read_settings(run: RunFiles) -> None:
    path, status = run.path("config.yaml"), run.path("run_status")
    if status.is_file():
        run.status = read_text(status, MOST_YAML_BYTES).strip()
    if not path.exists():
        run.say("config.yaml is missing, so target, objective and settings are not known")
        return
    run.config = load_config(path, trains=False)
    run.settings = parse_yaml(read_text(path, MOST_YAML_BYTES), str(path))


def _read_rows(run: RunFiles) -> None:
    run.metrics, run.heldout = (_rows(run, name) for name in ("metrics.jsonl", "heldout.jsonl"))
    _read_skipped(run)
    if not run.metrics:
        run.say("metrics.jsonl has no training curve", run.commands.train())
    if run.heldout:
        return
    if run.config is not None and not run.config.needs_target_logits:
        run.say("heldout.jsonl is missing: cross entropy alone gives no held-out tau")
    else:
        run.say(
            "heldout.jsonl is missing: held-out tau over training is known of runs that train with "
            "evaluate.heldout_files and evaluate.every",
            run.commands.train_with_heldout(),
        )


def _read_skipped(run: RunFiles) -> None:
    keys = ("iteration", "consumed_samples")
    rows = _rows(run, "skipped_samples.jsonl")
    run.skipped = [{key: row.get(key) for key in keys} for row in rows]
    counted = run.metrics[-1].get("skipped_steps") if run.metrics else 0
    if type(counted) is int and counted > len(rows):
        run.say(
            f"skipped_samples.jsonl has {len(rows):,} of the {counted:,} steps that were skipped; "
            "the others cannot be marked in the curves"
        )


def _rows(run: RunFiles, name: str) -> list[Row]:
    """The rows of a file that may not be there; lines that are none are counted and said."""
    rows, damaged, path = [], [], run.path(name)
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                row = _row(line)
                if row is None:
                    damaged.append(number)
                else:
                    rows.append(row)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if damaged:
        lines = "line" if len(damaged) == 1 else "lines"
        named = ", ".join(map(str, damaged[:5])) + ", ..." * (len(damaged) > 5)
        run.say(
            f"{name}: {lines} {named} left out ({len(damaged)} in all), which a killed run may "
            "have cut short"
        )
    return rows


def _row(line: str) -> Row | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(found, dict) and type(found.get("iteration")) is int
    return found if is_row else None


def _read_evaluations(run: RunFiles) -> None:
    run.evaluation = _shown_or_said(run, "evaluation.json", read_evaluation)
    run.untrained = _shown_or_said(run, UNTRAINED, read_evaluation)
    if run.evaluation is None and not run.path("evaluation.json").exists():
        run.say("evaluation.json is missing", run.commands.evaluate_with_records())
    if run.untrained is None and not run.path(UNTRAINED).exists():
        run.say(f"{UNTRAINED} is missing", run.commands.evaluate_untrained())
    last, evaluated = _last_step(run), (run.evaluation or {}).get("iteration")
    if type(evaluated) is int and last is not None and evaluated < last:
        run.say(
            f"evaluation.json is of step {evaluated:,}, and the run is at {last:,}",
            run.commands.evaluate(),
        )


def _last_step(run: RunFiles) -> int | None:
    return run.metrics[-1]["iteration"] if run.metrics else None


def _read_calibration(run: RunFiles, given: Path | None) -> None:
    if given is not None:
        require(
            run.evaluation is not None,
            f"--calibration {given} belongs to an evaluation, and {run.folder} has none that can "
            "be shown",
        )
        run.calibration = read_calibration(given, run.evaluation or {})
    elif run.config is not None and not run.config.model.enable_confidence_head:
        return
    elif not run.path("calibration.json").exists():
        run.say("calibration.json is missing", run.commands.calibrate())
    elif run.evaluation is None:
        run.say("calibration.json left out: it is shown beside the evaluation that it belongs to")
    else:
        evaluation = run.evaluation
        run.calibration = _shown_or_said(
            run, "calibration.json", lambda path: read_calibration(path, evaluation)
        )


def _read_simulation(run: RunFiles, given: Path | None) -> None:
    """Few runs have one, so nothing is said where there is none."""
    evaluation = run.evaluation or {}
    if given is not None:
        run.simulation = read_simulation(given, evaluation)
    elif evaluation:
        run.simulation = _shown_or_said(
            run, "serving.json", lambda path: read_simulation(path, evaluation)
        )


def _shown_or_said(run: RunFiles, name: str, read: Callable[[Path], Any]) -> Any:
    """What is read, or None with a line why not; None alone where there is no such file."""
    path = run.path(name)
    if not path.exists():
        return None
    try:
        return read(path)
    except ConfigError as error:
        run.say(f"{name} left out: {error}")
        return None
