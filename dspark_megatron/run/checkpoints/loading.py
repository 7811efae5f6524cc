"""A draft and its optimizer from a checkpoint of any parallel layout."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dspark_megatron.config.evaluate import Weights
from dspark_megatron.conversion.draft_tensors import check_finite
from dspark_megatron.errors import ConfigError
from dspark_megatron.mcore.averages.moving_average import MovingAverage
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.run.checkpoints.sharding import from_average, sharded_average, sharded_state
from dspark_megatron.run.checkpoints.state import RunState, read_state
from dspark_megatron.storage.checkpoints.damage import Damage
from dspark_megatron.storage.checkpoints.data_only import data_only
from dspark_megatron.storage.checkpoints.metadata import unreadable_shard
from dspark_megatron.storage.checkpoints.whole import (
    check_whole,
    parameter_groups,
    way_out_named,
)
from dspark_megatron.storage.torch_dist_folder import cause_of
from dspark_megatron.storage.training_checkpoint import check_has, has_average

_SETTINGS = ("max_lr", "min_lr", "betas", "eps")
"""What a parameter group takes from the config, not from a checkpoint."""


def load_checkpoint(
    folder: Path,
    model: DSparkDraftModel,
    optimizer: Any | None,
    average: MovingAverage | None = None,
    *,
    weights: Weights = "trained",
) -> RunState:
    """Fill the model, and the optimizer and the average if given, from a checkpoint of any parallel
    layout. average: of this optimizer; from a checkpoint that has none it starts at the weights.
    weights: that the model gets; ConfigError where the checkpoint does not have them. Collective
    over the world."""
    check_whole(folder)
    check_has(folder, weights)
    state = sharded_state(model, optimizer, is_loading=True)
    continues = average is not None and has_average(folder)
    if continues:
        state["average"] = sharded_average(state["model"], _room_for(model))
    if weights == "ema":
        state["model"] = from_average(state["model"])
    with way_out_named(folder):
        loaded = _loaded(folder, state)
    result = model.load_state_dict(loaded["model"], strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise ConfigError(
            f"checkpoint {folder} lacks {result.missing_keys} and has unknown "
            f"{result.unexpected_keys}"
        )
    check_finite(model, f"checkpoint {folder}")
    if optimizer is not None:
        _keep_settings(optimizer, loaded["optimizer"])
        with torch.no_grad():  # the fp32 optimizer copies into views of leaf parameters
            optimizer.load_state_dict(loaded["optimizer"])
    if average is not None:
        average.load(loaded["average"]) if continues else average.restart()
    return read_state(folder)


def _room_for(model: DSparkDraftModel) -> dict[str, Tensor]:
    """On the host, for the average of each trained parameter of this rank."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: torch.empty(p.shape) for name, p in trained}


def _loaded(folder: Path, state: dict) -> dict:
    """What Megatron-Core reads, as data alone. Damage where it cannot: bytes that are not what was
    saved lead to any exception in there."""
    try:
        with data_only():
            return dist_checkpointing.load(state, str(folder))
    except (Exception, CheckpointException) as error:
        cause = cause_of(error)
        no_damage = KeyboardInterrupt, dist.DistError, torch.OutOfMemoryError
        if isinstance(cause, no_damage) or "gloo" in str(cause):
            raise cause from None
        raise Damage.of(unreadable_shard(folder), cause) from error


def _keep_settings(optimizer: Any, loaded: dict) -> None:
    """Put this run's learning rates and constants into the loaded parameter groups: the config
    rules, not the checkpoint. Before loading, since newer Megatron-Core finds groups by them."""
    ours: dict[float, dict] = {}
    for group in optimizer.param_groups:  # AdamW's before Muon's, which has no betas
        ours.setdefault(group["lr_mult"], group)
    for group in parameter_groups(loaded):
        settings = ours[group["lr_mult"]]
        group.update({name: settings[name] for name in _SETTINGS if name in settings})
