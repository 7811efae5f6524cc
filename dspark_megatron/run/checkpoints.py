"""Checkpoints of a run: Megatron-Core's distributed format, complete or absent.

    checkpoints/iter_0000100/                      tensors (torch_dist) and dspark.json
    checkpoints/latest_checkpointed_iteration.txt  the newest complete one, written last
    checkpoints/best_checkpointed_iteration.txt    that of the best held-out tau, if there is one

A checkpoint is written under a temporary name and renamed when every rank is done, so a folder with
an `iter_` name is always whole. It loads at any tensor- or data-parallel size.
"""

import os
import queue
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from dspark_megatron.config import LossConfig
from dspark_megatron.errors import ConfigError
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.run.identity import clock_hint
from dspark_megatron.storage.checkpoint_metadata import check_whole, damaged
from dspark_megatron.storage.torch_dist_folder import cause_of
from dspark_megatron.storage.training_checkpoint import (
    BEST_TRACKER,
    META,
    TRACKER,
    iteration_folder,
    read_meta,
)
from dspark_megatron.storage.writing import write_json, write_text

_SHARDING = {
    # The only type of the distributed optimizer that loads at another TP and DP size.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
_SETTINGS = ("max_lr", "min_lr", "betas", "eps")
"""What a parameter group takes from the config, not from a checkpoint."""
_DEFAULTS = {"loss": asdict(LossConfig())}
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

    @property
    def is_best(self) -> bool:
        """Whether the best estimate so far was made here."""
        return self.best is not None and self.best.iteration == self.iteration


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
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    _collect_results_here()
    dist_checkpointing.save(
        _sharded_state(model, optimizer, is_loading=False),
        str(partial),
        content_metadata=_SHARDING,
    )
    if is_main:
        write_json(partial / META, {**meta, **asdict(state)})
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


def load_checkpoint(folder: Path, model: DSparkDraftModel, optimizer: Any | None) -> RunState:
    """Fill the model, and the optimizer if given, from a checkpoint of any parallel layout.
    Collective over the world."""
    check_whole(folder)  # Megatron-Core would unpickle its metadata unseen
    try:
        state = _sharded_state(model, optimizer, is_loading=True)
        loaded = dist_checkpointing.load(state, str(folder))
    except CheckpointException as error:
        raise damaged(folder, cause_of(error)) from error
    result = model.load_state_dict(loaded["model"], strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise ConfigError(
            f"checkpoint {folder} lacks {result.missing_keys} and has unknown "
            f"{result.unexpected_keys}"
        )
    if optimizer is not None:
        _keep_settings(optimizer, loaded["optimizer"])
        with torch.no_grad():  # the fp32 optimizer copies into views of leaf parameters
            optimizer.load_state_dict(loaded["optimizer"])
    return read_state(folder)


def read_state(folder: Path) -> RunState:
    """Where the run stood when it saved this checkpoint."""
    meta = read_meta(folder)
    best = BestEstimate(**meta["best"]) if meta.get("best") else None
    return RunState(meta["iteration"], meta["consumed_samples"], tuple(meta["open_metrics"]), best)


def check_same_run(folder: Path, meta: dict[str, Any]) -> None:
    """Refuse a checkpoint whose identity (shape, target, data, seed) is not this run's.

    Compares every key of `meta` that the checkpoint has, and those of the loss section that it
    lacks at their defaults; ConfigError lists what differs.
    """
    saved = read_meta(folder)
    different = []
    for key, value in meta.items():
        if isinstance(value, dict):
            old = _DEFAULTS.get(key, {}) | (saved.get(key) or {})
            different += [
                f"{key}.{k}: {old.get(k)!r} there, {v!r} here"
                for k, v in value.items()
                if old.get(k) != v
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


def _collect_results_here() -> None:
    """Give Megatron-Core's writer a queue of this process for its results. Left to itself it starts
    a process on each rank to serve one: 0.27 GB that outlive a killed rank, for saves that go on in
    the background. Ours is over when `save` returns."""
    filesystem_async._results_queue = queue.Queue()


def _sharded_state(model: DSparkDraftModel, optimizer: Any | None, *, is_loading: bool) -> dict:
    model_state = model.sharded_state_dict(metadata=dict(_SHARDING))
    if optimizer is None:
        return {"model": model_state}
    optimizer_state = optimizer.sharded_state_dict(
        model_state, is_loading=is_loading, metadata=dict(_SHARDING)
    )
    return {"model": model_state, "optimizer": optimizer_state}


def _keep_settings(optimizer: Any, loaded: dict) -> None:
    """Put this run's learning rates and constants into the loaded parameter groups: the config
    rules, not the checkpoint. Before loading, since newer Megatron-Core finds groups by them."""
    ours = optimizer.param_groups[0]  # all groups share them
    for group in loaded.get("optimizer", loaded)["param_groups"]:
        group.update({name: ours[name] for name in _SETTINGS})


def _prune(checkpoints: Path, newest: Path, keep_last: int, best: BestEstimate | None) -> None:
    """Delete all but the best and the `keep_last` checkpoints up to `newest`; a folder loses its
    name first, so that a kill on the way leaves no half checkpoint."""
    kept = best and iteration_folder(checkpoints, best.iteration)
    older = [f for f in sorted(checkpoints.glob("iter_*")) if f.name <= newest.name]
    for folder in older[:-keep_last]:
        if folder != kept:
            folder.rename(checkpoints / f".partial_{folder.name}")
    for leftover in checkpoints.glob(".partial_iter_*"):
        shutil.rmtree(leftover)
