"""Where a run stands, as its checkpoints say, and which runs may continue them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark_megatron.config import LossConfig, OptimizerConfig
from dspark_megatron.config.lr_scale import LearningRateScales
from dspark_megatron.config.objective.terms import OLDER_NAMES, LossTerms, without_older_names
from dspark_megatron.errors import ConfigError
from dspark_megatron.ops.logit_transform import IDENTITY
from dspark_megatron.run.identity import clock_hint
from dspark_megatron.shape import DraftShape
from dspark_megatron.storage.training_checkpoint import read_meta

_DEFAULTS = {
    "lr_scale": asdict(LearningRateScales()),
    "loss": asdict(LossConfig()),
    "shape": DraftShape.young_defaults(),
    "target_logits": asdict(IDENTITY),
    "optimizer": {"name": OptimizerConfig().name},
}
"""By section of dspark.json: what a checkpoint means by a key that is younger than it is."""


@dataclass(frozen=True)
class BestEstimate:
    """The best held-out tau of a run so far; its checkpoint is kept."""

    iteration: int
    tau: float
    conditions: dict[str, Any]
    """What it was estimated on and how; only estimates of the same compare."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands."""

    iteration: int
    consumed_samples: int
    open_metrics: tuple[float, ...] = ()
    """Packed sums of the log interval that the checkpoint stands in, over all ranks."""
    best: BestEstimate | None = None
    """None until an estimate is made, or when its checkpoint is gone."""
    skipped_steps: int = 0
    """Steps of the run that were not taken because they would have harmed the draft."""

    @property
    def is_best(self) -> bool:
        """Whether the best estimate so far was made here."""
        return self.best is not None and self.best.iteration == self.iteration


def read_state(folder: Path) -> RunState:
    """Where the run stood when it saved this checkpoint."""
    meta = read_meta(folder)
    best = BestEstimate(**meta["best"]) if meta.get("best") else None
    metrics = meta.get("open_metrics") or ()
    is_known = all(isinstance(number, int | float) for number in metrics)
    return RunState(
        meta["iteration"],
        meta["consumed_samples"],
        tuple(metrics) if is_known else (),  # JSON has null for what was not finite
        best,
        meta.get("skipped_steps", 0),
    )


def check_same_run(folder: Path, meta: dict[str, Any]) -> None:
    """Refuse a checkpoint whose identity (shape, target, data, seed) is not this run's.

    Compares every key of `meta` that the checkpoint has, and those of the sections in `_DEFAULTS`
    that it lacks at their defaults; ConfigError lists what differs.
    """
    saved = read_meta(folder)
    different = []
    for key, value in meta.items():
        if isinstance(value, dict):
            old = _DEFAULTS.get(key, {}) | _as_now(saved.get(key) or {})
            different += [
                line for k, v in value.items() for line in _differences(f"{key}.{k}", old.get(k), v)
            ]
        elif key in saved and saved[key] != value:
            different.append(f"{key}: {saved[key]!r} there, {value!r} here")
    if different:
        of_data = ("data_fingerprint", "template_date")
        hint = clock_hint(saved, meta) if any(d.startswith(of_data) for d in different) else ""
        raise ConfigError(
            f"checkpoint {folder} belongs to another run: {'; '.join(different)}. "
            f"Use another train.output_dir, or the settings of that run.{hint}"
        )


def _as_now(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved section, with the terms of the loss under the names that they have now."""
    if not saved.keys() & OLDER_NAMES.keys():
        return saved
    return without_older_names(saved, asdict(LossTerms()))


def _differences(name: str, there: Any, here: Any) -> list[str]:
    """A line for each key in which two values differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        return [
            line for k in keys for line in _differences(f"{name}.{k}", there.get(k), here.get(k))
        ]
    return [] if there == here else [f"{name}: {there!r} there, {here!r} here"]
