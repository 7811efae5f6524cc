"""Checkpoints of a run: Megatron-Core's distributed format, complete or absent.

    checkpoints/iter_0000100/                      tensors (torch_dist), dspark.json,
                                                   checksums.json
    checkpoints/latest_checkpointed_iteration.txt  the newest complete one, written last
    checkpoints/best_checkpointed_iteration.txt    that of the best held-out tau, if there is one

A checkpoint is written under a temporary name and renamed when every rank is done and the main rank
has seen all of it, so a folder with an `iter_` name is always whole. It loads at any tensor- or
data-parallel size.
"""

import contextlib
import os
import secrets
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from dspark_megatron.errors import ConfigError
from dspark_megatron.mcore.checkpoint_writer import write_in_this_process
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.run.checkpoints.sharding import SHARDING, sharded_state
from dspark_megatron.run.checkpoints.state import BestEstimate, RunState
from dspark_megatron.run.ranks.places import at
from dspark_megatron.run.ranks.runtime import from_main_rank
from dspark_megatron.storage.checkpoints.metadata import META
from dspark_megatron.storage.checkpoints.tracker import BEST_TRACKER, TRACKER
from dspark_megatron.storage.checkpoints.whole import check_whole, iteration_folder
from dspark_megatron.storage.checksums import Checksums, ranks_checksums, write_checksums
from dspark_megatron.storage.torch_dist_folder import cause_of
from dspark_megatron.storage.writing import remove, write_json, write_text

_UNFINISHED = ".partial_iter_*"
_LATE_SECONDS = 30.0
"""How long a network file system may take to show the main rank what the others wrote."""


def save_checkpoint(
    checkpoints: Path,
    state: RunState,
    meta: dict[str, Any],
    model: DSparkDraftModel,
    optimizer: Any | None,
    *,
    keep_last: int,
) -> Path:
    """Write a checkpoint of all ranks, then point the trackers and delete the oldest.

    Collective over the whole world. meta: what identifies the run, written to dspark.json.
    optimizer: None saves weights only (Megatron-Core cannot save one that has taken no step).
    ConfigError on all ranks, with the older checkpoints as they were, when any file of it is not
    written in full.
    """
    final, is_main = iteration_folder(checkpoints, state.iteration), dist.get_rank() == 0
    at(f"saving iteration {state.iteration}", longer=True)
    partial = from_main_rank(_new_folder(final) if is_main else None)
    write_in_this_process()
    tensors = sharded_state(model, optimizer, is_loading=False)
    problem: BaseException | None = None
    try:
        dist_checkpointing.save(tensors, str(partial), content_metadata=SHARDING)
    except CheckpointException as error:  # on every rank; the main one knows why
        problem = error
    except (OSError, RuntimeError) as error:
        # Of one rank, while the others wait for it: its word ends them. A full disk is any of both.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise
        raise _unsaved(final, error) from error
    checksums = ranks_checksums(partial)
    if is_main and problem is None:
        problem = _completed(partial, final, {**meta, **asdict(state)}, checksums)
    if text := from_main_rank(str(_unsaved(final, problem)) if is_main and problem else None):
        raise ConfigError(text)
    if is_main:
        write_text(checkpoints / TRACKER, f"{state.iteration}\n")
        track_best(checkpoints, state.best)
        _to_disk(checkpoints)
        _prune(checkpoints, final, keep_last, state.best)
    dist.barrier()
    return final


def _new_folder(final: Path) -> Path:
    """An empty folder to write into, on the main rank, after what killed saves have left is gone.
    Its name is new, so that a rank of a killed run that still writes does not write into it."""
    _clear(final.parent)
    partial = final.with_name(f".partial_{final.name}_{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    return partial


def _completed(
    partial: Path, final: Path, meta: dict[str, Any], checksums: Checksums
) -> Exception | None:
    """Take what all ranks have written as a checkpoint; or why that is not possible."""
    try:
        write_json(partial / META, meta)
        write_checksums(partial, checksums)
        _check_written(partial)
        _put_in_place(partial, final)
    except (ConfigError, OSError) as error:
        return error
    return None


def _unsaved(final: Path, error: BaseException) -> ConfigError:
    _clear(final.parent)  # it may fill the disk
    return ConfigError(
        f"checkpoint {final.name} could not be saved: {cause_of(error)}. Older ones in "
        f"{final.parent} are as they were; make room there if the disk is full, and start the run "
        "again"
    )


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


def _prune(checkpoints: Path, newest: Path, keep_last: int, best: BestEstimate | None) -> None:
    """Delete all but the best and the `keep_last` checkpoints up to `newest`, which was just seen
    to be whole; a folder loses its name first, so that a kill on the way leaves no half one."""
    kept = best and iteration_folder(checkpoints, best.iteration)
    older = [f for f in sorted(checkpoints.glob("iter_*")) if f.name <= newest.name]
    for folder in older[:-keep_last]:
        if folder != kept:
            folder.rename(checkpoints / f".partial_{folder.name}_{secrets.token_hex(4)}")
    _clear(checkpoints)


def _clear(checkpoints: Path) -> None:
    """Delete what lost its name or never had one. What is in use is left to the next save."""
    for leftover in checkpoints.glob(_UNFINISHED):
        with contextlib.suppress(ConfigError):
            remove(leftover)
