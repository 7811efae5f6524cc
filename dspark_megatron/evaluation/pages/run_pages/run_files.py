"""What a run's folder holds for a report: each file that is there, and for each that is missing or
cannot be shown a line that says so, with the command that makes it."""

import json
import shlex
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
    evaluation: dict[str, Any] | None = None
    untrained: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    simulation: list[dict[str, Any]] | None = None
    notes: list[Note] = field(default_factory=list)

    def say(self, text: str, command: str = "") -> None:
        self.notes.append(Note(text, command))

    def path(self, name: str) -> Path:
        return self.folder / name


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
    if not run.metrics:
        run.say("metrics.jsonl has no training curve", _train_command(run))
    if not run.heldout:
        run.say(
            "heldout.jsonl is missing: held-out tau over training is known of runs that train with "
            "evaluate.heldout_files and evaluate.every",
            _train_command(run, "evaluate.heldout_files=[ANSWERS]", "evaluate.every=STEPS"),
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
    run.untrained = _shown_or_said(run, "evaluation_untrained.json", read_evaluation)
    if run.evaluation is None and not run.path("evaluation.json").exists():
        records = f"evaluate.records={run.path('drafts.safetensors')}"
        run.say("evaluation.json is missing", _evaluate_command(run, records))
    if run.untrained is None and not run.path("evaluation_untrained.json").exists():
        output = f"evaluate.output={run.path('evaluation_untrained.json')}"
        words = ("evaluate.untrained=true", "evaluate.compare_plain=false", output)
        run.say("evaluation_untrained.json is missing", _evaluate_command(run, *words))
    last, evaluated = _last_step(run), (run.evaluation or {}).get("iteration")
    if type(evaluated) is int and last is not None and evaluated < last:
        run.say(
            f"evaluation.json is of step {evaluated:,}, and the run is at {last:,}",
            _evaluate_command(run),
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
        records = run.path("drafts.safetensors")
        first = (
            "" if records.exists() else f"{_evaluate_command(run, f'evaluate.records={records}')}\n"
        )
        words = ("--records", str(records), "--output", str(run.folder))
        command = f"python tools/calibrate_confidence.py {shlex.join(words)}"
        run.say("calibration.json is missing", first + command)
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


def _config_words(run: RunFiles) -> list[str]:
    path = run.path("config.yaml")
    return ["--config", str(path) if path.exists() else "RUN.yaml"]


def _train_command(run: RunFiles, *overrides: str) -> str:
    return shlex.join(["python", "-m", "dspark_megatron.train", *_config_words(run), *overrides])


def _evaluate_command(run: RunFiles, *overrides: str) -> str:
    words = ["python", "-m", "dspark_megatron.evaluate", *_config_words(run)]
    if run.config is None or not run.config.evaluate.prompt_files:
        words.append("evaluate.prompt_files=[PROMPTS]")
    if run.config is not None and run.config.target.is_stored:
        words.append("target.provider=huggingface")
    return shlex.join([*words, *overrides])
