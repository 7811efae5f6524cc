"""Checkpoints of a run: Megatron-Core's distributed format, complete or absent.

    checkpoints/iter_0000100/                      tensors (torch_dist), dspark.json,
                                                   checksums.json
    checkpoints/latest_checkpointed_iteration.txt  the newest complete one, written last
    checkpoints/best_checkpointed_iteration.txt    that of the best held-out tau, if there is one

A checkpoint is written under a temporary name and renamed when every rank is done, so a folder with
an `iter_` name is always whole. It loads at any tensor- or data-parallel size.
"""

import os
import queue
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.run.checkpoints.sharding import SHARDING, sharded_state
from dspark_megatron.run.checkpoints.state import BestEstimate, RunState
from dspark_megatron.storage.checkpoint_metadata import META
from dspark_megatron.storage.checkpoints.tracker import BEST_TRACKER, TRACKER
from dspark_megatron.storage.checkpoints.whole import iteration_folder
from dspark_megatron.storage.checksums import ranks_checksums, write_checksums
from dspark_megatron.storage.writing import remove, write_json, write_text


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
    """
    final = iteration_folder(checkpoints, state.iteration)
    partial = checkpoints / f".partial_{final.name}"
    is_main = dist.get_rank() == 0
    if is_main:
        remove(partial)
        partial.mkdir(parents=True)
    dist.barrier()
    collect_results_here()
    dist_checkpointing.save(
        sharded_state(model, optimizer, is_loading=False),
        str(partial),
        content_metadata=SHARDING,
    )
    checksums = ranks_checksums(partial)
    if is_main:
        write_json(partial / META, {**meta, **asdict(state)})
        write_checksums(partial, checksums)
        if final.exists():  # it loses its name whole; pruning deletes it
            final.rename(partial.with_name(f"{partial.name}_{os.urandom(4).hex()}"))
        partial.rename(final)
        write_text(checkpoints / TRACKER, f"{state.iteration}\n")
        track_best(checkpoints, state.best)
        _prune(checkpoints, final, keep_last, state.best)
    dist.barrier()
    return final


def track_best(checkpoints: Path, best: BestEstimate | None) -> None:
    """Let the tracker say what a run's state says; a kill may have come between the two."""
    tracker = checkpoints / BEST_TRACKER
    if best is None:
        tracker.unlink(missing_ok=True)
    else:
        write_text(tracker, f"{best.iteration}\n")


def collect_results_here() -> None:
    """Give Megatron-Core's writer a queue of this process for its results. Left to itself it starts
    a process on each rank to serve one: 0.27 GB that outlive a killed rank, for saves that go on in
    the background. Ours is over when `save` returns."""
    filesystem_async._results_queue = queue.Queue()


def _prune(checkpoints: Path, newest: Path, keep_last: int, best: BestEstimate | None) -> None:
    """Delete all but the best and the `keep_last` checkpoints up to `newest`; a folder loses its
    name first, so that a kill on the way leaves no half checkpoint."""
    kept = best and iteration_folder(checkpoints, best.iteration)
    older = [f for f in sorted(checkpoints.glob("iter_*")) if f.name <= newest.name]
    for folder in older[:-keep_last]:
        if folder != kept:
            folder.rename(checkpoints / f".partial_{folder.name}")
    for leftover in checkpoints.glob(".partial_iter_*"):
        remove(leftover)
