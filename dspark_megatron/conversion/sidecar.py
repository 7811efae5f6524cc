"""`dspark_sts.json`: temperatures of the confidence head by draft token, in SGLang's schema.

Calibration writes it beside a draft; conversion carries it along. The keys `iteration`,
`checkpoint` and `checkpoint_digest` say which draft it is of.
"""

import math
import os
import shutil
from pathlib import Path
from typing import Any

from dspark_megatron.bounded_text import read_json
from dspark_megatron.conversion.layouts.anchor_slot import block_of_config
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.storage.checkpoints.named import (
    NamedCheckpoint,
    checkpoint_facts,
    is_same_checkpoint,
)
from dspark_megatron.storage.writing import json_text

SIDECAR = "dspark_sts.json"


def check_sidecar(
    folder: Path,
    num_draft_tokens: int,
    iteration: int | None = None,
    checkpoint: NamedCheckpoint | None = None,
) -> bool:
    """Whether the folder has one. ConfigError when it cannot be used with this draft: SGLang wants
    one positive temperature for each draft token. iteration, checkpoint: of the draft, where known;
    a sidecar that names another was calibrated for another."""
    file = folder / SIDECAR
    if not file.is_file():
        return False
    try:
        found: Any = read_json(file)
        temperatures, own = found["temperatures"], found.get("iteration")
        calibrated = NamedCheckpoint.of_facts(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} must be JSON with a list `temperatures` ({error!r})") from error
    numbers = isinstance(temperatures, list) and all(
        type(x) in (int, float) and 0 < x < math.inf for x in temperatures
    )
    require(
        numbers and len(temperatures) == num_draft_tokens,
        f"{file} must hold one positive temperature for each of the {num_draft_tokens} draft "
        f"tokens, has {temperatures}; calibrate again, or move the file away",
    )
    require(
        own is None or iteration is None or own == iteration,
        f"{file} was calibrated for iteration {own}, this draft is of {iteration}; calibrate "
        "again, or move the file away",
    )
    require(
        calibrated is None
        or checkpoint is None
        or calibrated.is_same(checkpoint)
        or _came_with(folder, calibrated, checkpoint),
        f"{file} was calibrated for {calibrated and calibrated.describe()}, this draft "
        f"is {checkpoint and checkpoint.describe()}; calibrate again, or move the file away",
    )
    return True


def _came_with(folder: Path, calibrated: NamedCheckpoint, checkpoint: NamedCheckpoint) -> bool:
    """Whether an older sidecar, which has no digest, lies in the checkpoint's own run and names a
    checkpoint of such a number that is gone: the run has another name now."""
    there, here = Path(calibrated.path), Path(checkpoint.path)
    return (
        calibrated.digest is None
        and calibrated.weights == checkpoint.weights
        and here.parts[-2:] == there.parts[-2:]
        and here.absolute().parents[1] == folder.absolute()
        and not os.path.exists(there)  # False for what no file can be called
    )


def is_of_same_draft(own: Path, other: Path) -> bool:
    """Whether two sidecars are equal, or calibrations of the same checkpoint, of which a newer one
    takes the place of an older."""
    if own.read_bytes() == other.read_bytes():
        return True
    try:
        one, two = map(read_json, (own, other))
        first, second = map(NamedCheckpoint.of_facts, (one, two))
        same = first is not None and is_same_checkpoint(first, second)
        return same and one["iteration"] == two["iteration"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def read_temperatures(
    folder: Path,
    num_draft_tokens: int,
    iteration: int | None = None,
    checkpoint: NamedCheckpoint | None = None,
) -> list[float]:
    """Of each draft token; ConfigError as in `check_sidecar`, and when there are none."""
    found = check_sidecar(folder, num_draft_tokens, iteration, checkpoint)
    require(found, f"{folder} must hold a {SIDECAR}; `dspark calibrate` makes one")
    return read_json(folder / SIDECAR)["temperatures"]


def carry_sidecar(source: Path, folder: Path) -> None:
    if (source / SIDECAR).is_file():
        shutil.copyfile(source / SIDECAR, folder / SIDECAR)


def sidecar_json(calibration: dict[str, Any]) -> str:
    """The sidecar's text. calibration: what `calibration.json` holds. The calibration errors are of
    the survival, by draft token, on the part held out; only numbers, so none when one has none."""
    errors = [calibration["survival"][when]["ece"] for when in ("before", "after")]
    before, after = errors if all(None not in by_slot for by_slot in errors) else ([], [])
    content = {
        "temperatures": calibration["temperatures"],
        "dataset": ", ".join(calibration["prompt_files"]),
        "num_samples": calibration["fit"]["rounds"],
        "ece_before": before,
        "ece_after": after,
        "iteration": calibration["iteration"],
        **checkpoint_facts(calibration),
        "note": calibration["verdict"],
    }
    return json_text(content, indent=2) + "\n"


def check_place(folder: Path, num_draft_tokens: int, facts: dict[str, Any], force: bool) -> None:
    """ConfigError when the sidecar of a draft would not belong into this folder, or would replace
    one that calibration of the same checkpoint did not write (allowed with `force`). facts: of the
    draft's records."""
    own = _own_draft_tokens(folder / "config.json")
    require(
        own in (None, num_draft_tokens),
        f"{folder} holds a draft of {own} draft tokens a block, the records are of "
        f"{num_draft_tokens}; choose the folder of the draft that was evaluated",
    )
    file = folder / SIDECAR
    if force or not file.exists():
        return
    same, of, named = False, "not of a calibration", NamedCheckpoint.of_facts(facts)
    try:
        found = read_json(file)
        there = NamedCheckpoint.of_facts(found)
        of = f"of iteration {found['iteration']} of {there and there.describe()}"
        same = found["iteration"] == facts["iteration"] and is_same_checkpoint(there, named)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    require(
        same,
        f"{file} is {of}, the records are of iteration {facts['iteration']} of "
        f"{named and named.describe()}; give --force to replace it, or choose another --output",
    )


def _own_draft_tokens(config_file: Path) -> int | None:
    """Of the draft whose config this is; None when there is none or it does not say."""
    try:
        config = read_json(config_file)
        own = {**(config.get("dflash_config") or {}), **config}
        if "speculators_config" in own:  # its block has the anchor's slot, too
            return own["block_size"] - (own["sample_from_anchor"] is False)
        slots, from_anchor = block_of_config(own)
        return slots - (not from_anchor)
    except (OSError, ConfigError, KeyError, ValueError, TypeError, AttributeError):
        return None
