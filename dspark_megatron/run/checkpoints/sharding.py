"""How draft and optimizer are named in a checkpoint, the same for saving and for loading."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor

from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.storage.checkpoints.metadata import AVERAGE_PREFIX

SHARDING = {
    # The only type of the distributed optimizer that loads at another TP and DP size.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


def sharded_state(model: DSparkDraftModel, optimizer: Any | None, *, is_loading: bool) -> dict:
    model_state = model.sharded_state_dict(metadata=dict(SHARDING))
    if optimizer is None:
        return {"model": model_state}
    optimizer_state = optimizer.sharded_state_dict(
        model_state, is_loading=is_loading, metadata=dict(SHARDING)
    )
    return {"model": model_state, "optimizer": optimizer_state}


def sharded_average(model_state: dict, parts: Mapping[str, Tensor]) -> dict:
    """This rank's part of the average of each trained parameter, by name. What is in every
    checkpoint and not trained, if anything, is its own average."""
    prefix = AVERAGE_PREFIX.removesuffix(".")
    return {
        name: make_sharded_optimizer_tensor(entry, parts.get(name, entry.data), prefix)
        for name, entry in model_state.items()
    }


def from_average(model_state: dict) -> dict:
    """The draft's state, read from the moving average in a checkpoint."""
    return {n: replace(entry, key=AVERAGE_PREFIX + entry.key) for n, entry in model_state.items()}
