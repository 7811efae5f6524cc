"""Which checkpoint a run continues from, and whether anything is left to do from there: known
before data and target are read.
"""

from pathlib import Path

from dspark_megatron.config import Config
from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.checkpoints.state import check_same_run, read_state
from dspark_megatron.run.identity import run_identity
from dspark_megatron.run.ranks.runtime import Runtime, from_main_rank, main_ranks_folder
from dspark_megatron.storage.checkpoints.tracker import latest_iteration, mend_tracker
from dspark_megatron.storage.checkpoints.whole import check_whole, iteration_folder
from dspark_megatron.storage.training_checkpoint import find_checkpoint, read_meta
from dspark_megatron.training.ending.run_end import RunEnd


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
