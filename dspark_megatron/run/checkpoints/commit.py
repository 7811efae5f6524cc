"""How a checkpoint comes to have its name, and older ones lose theirs: all on the main rank.

.partial_iter_0000100_1a2b3c4d/   written into by all ranks, then seen to be whole, then renamed
.partial_*                        what a killed run or a failed save left, or lost its name
"""

import contextlib
import os
import secrets
import time
from pathlib import Path
from typing import Any

from dspark_megatron.errors import ConfigError
from dspark_megatron.run.checkpoints.state import BestEstimate, RunState
from dspark_megatron.storage.checkpoints.metadata import META
from dspark_megatron.storage.checkpoints.tracker import BEST_TRACKER, TRACKER
from dspark_megatron.storage.checkpoints.whole import check_whole, iteration_folder
from dspark_megatron.storage.checksums import Checksums, write_checksums
from dspark_megatron.storage.writing import remove, write_json, write_text

_UNFINISHED = ".partial_iter_*"
_LATE_SECONDS = 30.0
"""How long a network file system may take to show the main rank what the others wrote."""


def new_folder(final: Path) -> Path:
    """An empty folder to write into, on the main rank, after what killed saves have left is gone.
    Its name is new, so that a rank of a killed run that still writes does not write into it."""
    clear(final.parent)
    partial = final.with_name(f".partial_{final.name}_{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    return partial


def complete(partial: Path, final: Path, meta: dict[str, Any], checksums: Checksums) -> str:
    """Take what all ranks have written as a checkpoint. Why that is not possible; empty where it
    is done."""
    try:
        write_json(partial / META, meta)
        write_checksums(partial, checksums)
        _check_written(partial)
        _put_in_place(partial, final)
    except (ConfigError, OSError) as error:
        return str(error)
    return ""


def _check_written(folder: Path) -> None:
    """ConfigError unless every file that the metadata names is there, with its size."""
    deadline = time.monotonic() + _LATE_SECONDS
    while True:
        try:
            return check_whole(folder)
        except ConfigError as error:
            if time.monotonic() > deadline:
                found, _, _ = str(error).partition("; copy it again")
                raise ConfigError(
                    f"{found}; the main rank must see what all ranks write, so train.output_dir "
                    "must be on a file system that all nodes share"
                ) from error
            time.sleep(1)


def _put_in_place(partial: Path, final: Path) -> None:
    """Give a checkpoint its name once all of it is on the disk, not in memory only."""
    for file in partial.iterdir():
        if file.suffix != ".distcp":  # whose writers have done so
            _to_disk(file)
    _to_disk(partial)
    if final.exists():  # it loses its name whole; pruning deletes it
        final.rename(partial.with_name(f"{partial.name}_replaced"))
    partial.rename(final)
    _to_disk(final.parent)


def _to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def track_best(checkpoints: Path, best: BestEstimate | None) -> None:
    """Let the tracker say what a run's state says; a kill may have come between the two."""
    tracker = checkpoints / BEST_TRACKER
    if best is None:
        tracker.unlink(missing_ok=True)
    else:
        write_text(tracker, f"{best.iteration}\n")


def point_to(newest: Path, state: RunState, *, keep_last: int) -> None:
    """Let the trackers name a checkpoint that was just seen to be whole, and delete all but the
    best and the `keep_last` up to it. A folder loses its name first, so that a kill on the way
    leaves no half one."""
    checkpoints = newest.parent
    write_text(checkpoints / TRACKER, f"{state.iteration}\n")
    track_best(checkpoints, state.best)
    _to_disk(checkpoints)
    kept = state.best and iteration_folder(checkpoints, state.best.iteration)
    older = [f for f in sorted(checkpoints.glob("iter_*")) if f.name <= newest.name]
    for folder in older[:-keep_last]:
        if folder != kept:
            folder.rename(checkpoints / f".partial_{folder.name}_{secrets.token_hex(4)}")
    clear(checkpoints)


def clear(checkpoints: Path) -> None:
    """Delete what lost its name or never had one. What is in use is left to the next save."""
    for leftover in checkpoints.glob(_UNFINISHED):
        with contextlib.suppress(ConfigError):
            remove(leftover)
