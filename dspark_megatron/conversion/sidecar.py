"""`dspark_sts.json`: temperatures of the confidence head by slot, in SGLang's schema.

Calibration writes it beside a draft; conversion carries it along. A key `iteration` says which
checkpoint of a run it is of.
"""

import json
import math
import shutil
from pathlib import Path

from dspark_megatron.config import ConfigError, require

SIDECAR = "dspark_sts.json"


def check_sidecar(folder: Path, block_size: int, iteration: int | None = None) -> bool:
    """Whether the folder has one. ConfigError when it cannot be used with this draft: SGLang wants
    one positive temperature for each slot. iteration: of the draft; a sidecar that names another
    was calibrated for another."""
    file = folder / SIDECAR
    if not file.is_file():
        return False
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        temperatures, own = found["temperatures"], found.get("iteration")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} must be JSON with a list `temperatures` ({error!r})") from error
    numbers = isinstance(temperatures, list) and all(
        type(x) in (int, float) and 0 < x < math.inf for x in temperatures
    )
    require(
        numbers and len(temperatures) == block_size,
        f"{file} must hold one positive temperature for each of the {block_size} slots, has "
        f"{temperatures}; calibrate again, or move the file away",
    )
    require(
        own is None or iteration is None or own == iteration,
        f"{file} was calibrated for iteration {own}, this draft is of {iteration}; calibrate "
        "again, or move the file away",
    )
    return True


def read_temperatures(folder: Path, block_size: int, iteration: int | None = None) -> list[float]:
    """Temperature of each slot; ConfigError as in `check_sidecar`, and when there are none."""
    found = check_sidecar(folder, block_size, iteration)
    require(found, f"{folder} must hold a {SIDECAR}; tools/calibrate_confidence.py makes one")
    return json.loads((folder / SIDECAR).read_text(encoding="utf-8"))["temperatures"]


def carry_sidecar(source: Path, folder: Path) -> None:
    if (source / SIDECAR).is_file():
        shutil.copyfile(source / SIDECAR, folder / SIDECAR)
