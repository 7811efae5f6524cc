"""What stays the same in a run's whole life: what `dspark.json` says of it, and the day that a chat
template is given which reads the clock.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from dspark_megatron.bounded_text import parse_yaml
from dspark_megatron.data.chats.template import reads_clock
from dspark_megatron.errors import ConfigError
from dspark_megatron.run.check import RunPlan
from dspark_megatron.storage.checkpoints.metadata import META
from dspark_megatron.storage.checkpoints.tracker import latest_iteration
from dspark_megatron.storage.checkpoints.whole import iteration_folder
from dspark_megatron.targets.stored.layout import MANIFEST, UNFINISHED

_NO_MATHEMATICS = ("preset", "chunk_rows", "memory_budget_mb", "compile")
"""Keys of the loss section that a run may change on its way. What a preset stands for is written
out in the other keys."""


def draft_identity(plan: RunPlan) -> dict[str, Any]:
    """What a checkpoint must share with every use of it."""
    return {"shape": plan.shape.to_dict(), "target_fingerprint": plan.target_fingerprint}


def run_identity(plan: RunPlan) -> dict[str, Any]:
    """What a checkpoint must share with a run that continues it, the data aside."""
    loss, day = asdict(plan.config.loss), template_day(plan)
    return {
        **draft_identity(plan),
        **({"template_date": day} if day else {}),
        "target_logits": asdict(plan.target_transform),
        "lr_scale": asdict(plan.config.optimizer.lr_scale),
        "seed": plan.config.train.seed,
        "num_anchors": plan.config.model.num_anchors,
        "optimizer": {"name": plan.config.optimizer.name},
        "loss": {name: value for name, value in loss.items() if name not in _NO_MATHEMATICS},
    }


def export_settings(plan: RunPlan) -> dict[str, Any]:
    """What an export says of the training, beside the shape."""
    return {
        "initializer_range": plan.config.model.initializer_range,
        "confidence_head_alpha": plan.config.loss.confidence_head_alpha,
    }


def template_day(plan: RunPlan) -> str | None:
    """data.template_date, if the target's chat template reads the clock."""
    clock = plan.found_tokenizer is not None and reads_clock(plan.tokenizer.chat_template)
    return plan.config.data.template_date if clock else None


def fix_template_day(
    plan: RunPlan, main_ranks: Callable[[Callable[[], str]], str], *, stored: Path | None = None
) -> None:
    """Set data.template_date, where it is null and the chat template reads the clock, to that of
    what is continued: `stored`, else the run in train.output_dir, else target.cache. A new run
    takes today's, by the main rank's clock. Every rank calls it. main_ranks: gives every rank what
    a function returns on the main rank."""
    config = plan.config
    if config.data.template_date is not None:
        return
    reads = reads_clock(plan.tokenizer.chat_template)

    def choose() -> str:
        if not reads:
            return ""
        kept = _of_stored_states(stored) if stored else None
        kept = kept or _of_run(Path(config.train.output_dir))
        if not kept and config.target.is_stored:
            kept = _of_stored_states(Path(config.target.cache))
        return kept or date.today().isoformat()

    day = main_ranks(choose)  # asked for by every rank: their templates are compared later only
    if reads and day:
        config.data.template_date = day


def clock_hint(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What to do where data differ since a chat template was given another day; empty where it was
    not. Both: facts with `template_date` if it is known."""
    day = here.get("template_date")
    if day is None or there.get("template_date") == day:
        return ""
    kept = there.get("template_date")
    way_out = f"to {kept}" if kept else "to the day on which that was begun"
    return (
        f" The target's chat template reads the clock, and was given {day} here: set "
        f"data.template_date {way_out}."
    )


def _of_run(folder: Path) -> str | None:
    """What its newest checkpoint says, its config (before the first checkpoint), or what Megatron's
    loop keeps beside its checkpoints."""
    found = []
    if (iteration := latest_iteration(folder / "checkpoints")) is not None:
        newest = iteration_folder(folder / "checkpoints", iteration)
        found.append(_read(newest / META, json.loads))
    found.append(_read(folder / "config.yaml", _yaml).get("data") or {})
    found.append(_read(folder / META, json.loads))
    return next((day for facts in found if (day := facts.get("template_date"))), None)


def _yaml(text: str) -> Any:
    return parse_yaml(text, "it")


def _of_stored_states(folder: Path) -> str | None:
    for name in (MANIFEST, UNFINISHED):
        if data := _read(folder / name, json.loads).get("data"):
            return data.get("template_date")
    return None


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """A file of keys; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        return dict(parse(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read for the day that the chat template was given: {error}; set "
            "data.template_date"
        ) from error
