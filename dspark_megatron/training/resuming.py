"""Where a run ends, in what was asked for; which checkpoint it continues from, and whether anything
is left to do from there: known before data and target are read.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from dspark_megatron.config import Config, TrainConfig
from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.checkpoints.state import RunState, check_same_run, read_state
from dspark_megatron.run.identity import run_identity
from dspark_megatron.run.ranks.runtime import Runtime, from_main_rank, main_ranks_folder
from dspark_megatron.storage.checkpoints.tracker import latest_iteration, mend_tracker
from dspark_megatron.storage.checkpoints.whole import check_whole, iteration_folder
from dspark_megatron.storage.training_checkpoint import find_checkpoint, read_meta


@dataclass(frozen=True)
class RunEnd:
    """Stays what it is when the batch size changes on the way."""

    iterations: int | None
    """Null where samples were asked for."""
    samples: int | None
    """Null where iterations were asked for."""
    global_batch_size: int

    @classmethod
    def of(cls, train: TrainConfig, num_samples: int) -> "RunEnd":
        """num_samples: of one epoch."""
        samples = None
        if train.epochs is not None:
            samples = max(1, math.ceil(train.epochs * num_samples))
        return cls(train.iterations, samples, train.global_batch_size)

    def is_reached(self, state: RunState) -> bool:
        if self.iterations is not None:
            return state.iteration >= self.iterations
        return state.consumed_samples >= (self.samples or 0)

    def last_iteration(self, state: RunState) -> int:
        """The iteration that a run in this state ends with; its own when it has ended."""
        if self.iterations is not None:
            return max(state.iteration, self.iterations)
        left = max(0, (self.samples or 0) - state.consumed_samples)
        return state.iteration + math.ceil(left / self.global_batch_size)

    @property
    def steps(self) -> int:
        """Of a run that has this batch size from its start to its end."""
        return self.iterations or math.ceil((self.samples or 0) / self.global_batch_size)

    @property
    def progress_of_a_step(self) -> int:
        """In the unit of `progress`."""
        return 1 if self.iterations is not None else self.global_batch_size

    def progress(self, state: RunState) -> int:
        """Iterations or samples so far, whichever the end is in. The learning rate goes by it."""
        return state.iteration if self.iterations is not None else state.consumed_samples

    def describe(self, state: RunState) -> str:
        """Where a run in this state stands."""
        if self.iterations is not None:
            return f"iteration {state.iteration:,} of {self.iterations:,}"
        samples, consumed = self.samples or 0, state.consumed_samples
        more = f", {consumed - samples:,} more in the last batch" if consumed > samples else ""
        done = min(consumed, samples)
        return f"iteration {state.iteration:,}, {done:,} of {samples:,} samples{more}"


def checkpoint_to_resume(plan: RunPlan, checkpoints: Path, runtime: Runtime) -> Path | None:
    """The checkpoint to continue from, if there is one, seen to be whole and of this run as far as
    that needs no data. The main rank decides for all."""
    chosen = None
    if runtime.is_main and (chosen := _chosen(plan.config, checkpoints)) is not None:
        require(
            not read_meta(chosen).get("weights_only"),
            f"{chosen} holds imported weights without an optimizer: it cannot be continued; set "
            "train.initial_checkpoint to it and train.output_dir to a new folder",
        )
        check_whole(chosen, plan.config.storage.verify)
        if plan.config.train.resume_from is None:
            mend_tracker(chosen)
    folder = main_ranks_folder(chosen, runtime)
    if folder is not None:
        check_same_run(folder, run_identity(plan))
    return folder


def _chosen(config: Config, checkpoints: Path) -> Path | None:
    """The newest one; with train.resume_from that one, until the run has gone on from there and
    has a whole checkpoint of that."""
    train = config.train
    if not train.resume:
        return None
    if train.resume_from is None:
        newest = latest_iteration(checkpoints)  # found, where the tracker is lost
        return None if newest is None else iteration_folder(checkpoints, newest)
    named = find_checkpoint(checkpoints, train.resume_from)
    try:
        folder = iteration_folder(checkpoints, latest_iteration(checkpoints) or 0)
        if read_meta(folder).get("resumed_from") == train.resume_from:
            check_whole(folder)
            return folder
    except ConfigError:  # what is wrong with the newest may be why another one is named
        pass
    return named


def finished_state(
    plan: RunPlan, folder: Path | None, output_dir: Path, runtime: Runtime
) -> str | None:
    """How far the run of a checkpoint is, if nothing is left to do; None where something is, or
    that is not known before the data are read. The main rank decides for all: one broadcast."""
    state = _finished_state(plan.config, folder, output_dir) if runtime.is_main else None
    return from_main_rank(state)


def _finished_state(config: Config, folder: Path | None, output_dir: Path) -> str | None:
    if folder is None or not _has_data_of(output_dir, config):
        return None
    num_samples = read_meta(folder).get("num_samples")
    if config.train.epochs is not None and num_samples is None:  # of an older version
        return None
    end, state = RunEnd.of(config.train, num_samples or 0), read_state(folder)
    return end.describe(state) if end.is_reached(state) else None


def _has_data_of(output_dir: Path, config: Config) -> bool:
    """Whether the run was last started with the same data section. With another one the data are
    read, to see whether they are the same."""
    try:
        return load_config(output_dir / "config.yaml").data == config.data
    except ConfigError:
        return False


def finished_text(state: str, train: TrainConfig) -> str:
    """What is said of a run that had reached its end before it was started."""
    key = "train.iterations" if train.iterations is not None else "train.epochs"
    return f"nothing is left to do: the run is at {state}; {key} must ask for more to continue it"


def average_text(folder: Path, decay: float | None) -> str:
    """What is said of the moving average of a run that continues from a checkpoint with this
    optimizer.ema_decay; empty where it simply goes on, or there is none."""
    before = read_meta(folder).get("ema_decay")
    if before == decay:
        return ""
    if before is None:
        return f"{folder.name} has no moving average of the weights: it starts at these weights"
    if decay is None:
        return (
            f"the moving average of {folder.name} is dropped: optimizer.ema_decay is null and was "
            f"{before}"
        )
    return f"the moving average goes on with optimizer.ema_decay {decay}; it was {before}"
