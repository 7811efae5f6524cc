"""Checkpoints of a run: Megatron-Core's distributed format, complete or absent.

    checkpoints/iter_0000100/                      tensors (torch_dist), dspark.json,
                                                   checksums.json
    checkpoints/latest_checkpointed_iteration.txt  the newest complete one, written last
    checkpoints/best_checkpointed_iteration.txt    that of the best held-out tau, if there is one

A checkpoint is written under a temporary name and renamed when every rank is done and the main rank
has seen all of it, so a folder with an `iter_` name is always whole. It loads at any tensor- or
data-parallel size.

A save is started and finished by all ranks together. In between a thread of each rank writes its
files, and the ranks may train on.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from dspark_megatron.errors import ConfigError
from dspark_megatron.mcore.averages.moving_average import MovingAverage
from dspark_megatron.mcore.checkpoint_writer import PlannedSave
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.run.checkpoints.commit import clear, complete, new_folder, point_to
from dspark_megatron.run.checkpoints.sharding import SHARDING, sharded_average, sharded_state
from dspark_megatron.run.checkpoints.state import RunState
from dspark_megatron.run.ranks.places import at
from dspark_megatron.run.ranks.runtime import from_main_rank
from dspark_megatron.storage.checkpoints.whole import iteration_folder
from dspark_megatron.storage.checksums import Checksums, checksums_of_rank
from dspark_megatron.storage.torch_dist_folder import cause_of


def save_checkpoint(
    checkpoints: Path,
    state: RunState,
    meta: dict[str, Any],
    model: DSparkDraftModel,
    optimizer: Any | None,
    average: MovingAverage | None = None,
    *,
    keep_last: int,
) -> Path:
    """Start a save and wait for its end."""
    save = start_save(checkpoints, state, meta, model, optimizer, average, copies=False)
    return save.finish(keep_last=keep_last)


def start_save(
    checkpoints: Path,
    state: RunState,
    meta: dict[str, Any],
    model: DSparkDraftModel,
    optimizer: Any | None,
    average: MovingAverage | None = None,
    *,
    copies: bool,
) -> "RunningSave":
    """Plan a checkpoint of all ranks and begin to write it; the one before must be finished.

    meta: what identifies the run, written to dspark.json. optimizer: None saves weights only
    (Megatron-Core cannot save one that has taken no step). average: the meta has its `ema_decay`.
    copies: model, optimizer and average may change from now on; else they must not until the save
    is finished. Copies need host memory for what this rank writes.

    Collective over the whole world: a broadcast of an object, what Megatron-Core gathers to plan,
    and `MovingAverage.parts`. ConfigError, with the older checkpoints as they were, where that
    finds no room.
    """
    final, is_main = iteration_folder(checkpoints, state.iteration), dist.get_rank() == 0
    at(f"saving iteration {state.iteration}", longer=True)
    with _told_by_one_rank(final):
        partial = from_main_rank(new_folder(final) if is_main else None)
    tensors = sharded_state(model, optimizer, is_loading=False)
    if average is not None:
        parts = {name: part.cpu() for name, part in average.parts()}
        tensors["average"] = sharded_average(tensors["model"], parts)
    with _told_by_one_rank(final):
        planned = PlannedSave.of(tensors, partial, content_metadata=SHARDING, copies=copies)
    thread = ThreadPoolExecutor(1, thread_name_prefix=final.name)
    written = thread.submit(_written, planned, partial)
    thread.shutdown(wait=False)  # it ends after this one
    return RunningSave(final, partial, state, meta, planned, written)


@dataclass(frozen=True)
class Written:
    """What one rank says of its files."""

    checksums: Checksums
    problem: str
    """Why there is one that is not written; empty where all are."""


def _written(planned: PlannedSave, partial: Path) -> Written:
    try:
        planned.write()
        return Written(checksums_of_rank(partial), "")
    except Exception as error:  # whatever it is, the other ranks wait for this one's word
        return Written({}, str(error) or type(error).__name__)


@dataclass(frozen=True)
class RunningSave:
    """A checkpoint that is being written."""

    final: Path
    partial: Path
    state: RunState
    meta: dict[str, Any]
    planned: PlannedSave
    written: Future[Written]

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its files, or failed."""
        return self.written.done()

    def finish(self, *, keep_last: int) -> Path:
        """Wait until all ranks have written; then give the checkpoint its name, point the trackers
        and delete the oldest.

        Collective over the whole world: an all-gather and a gather of objects, two broadcasts and
        two barriers. ConfigError on all ranks, with the older checkpoints as they were, when any
        file of it is not written in full.
        """
        at(f"waiting for the checkpoint of iteration {self.state.iteration}", longer=True)
        mine, is_main = self.written.result(), dist.get_rank() == 0
        everyone = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        problem = next((one.problem for one in everyone if one.problem), "") or self._finalized()
        if is_main and not problem:
            checksums = {name: found for one in everyone for name, found in one.checksums.items()}
            problem = complete(
                self.partial, self.final, {**self.meta, **asdict(self.state)}, checksums
            )
        if problem := from_main_rank(problem):
            if is_main:
                clear(self.final.parent)  # it may fill the disk
            raise _unsaved(self.final, problem)
        if is_main:
            point_to(self.final, self.state, keep_last=keep_last)
        dist.barrier()
        return self.final

    def _finalized(self) -> str:
        """Write the metadata; why that failed, empty where it did not. Every rank calls it."""
        try:
            with _told_by_one_rank(self.final):
                self.planned.finalize()
        except CheckpointException as error:  # on every rank; the main one knows why
            return str(cause_of(error)) if error.failures else "another rank failed"
        return ""


@contextlib.contextmanager
def _told_by_one_rank(final: Path) -> Iterator[None]:
    """An error that one rank has while the others wait for it: its word ends them."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise
        clear(final.parent)
        raise _unsaved(final, str(error)) from error


def _unsaved(final: Path, problem: str) -> ConfigError:
    return ConfigError(
        f"checkpoint {final.name} could not be saved: {problem}. Older ones in "
        f"{final.parent} are as they were; make room there if the disk is full, and start the run "
        "again"
    )
