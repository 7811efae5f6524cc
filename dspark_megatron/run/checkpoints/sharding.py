"""How draft and optimizer are named in a checkpoint, the same for saving and for loading."""

from typing import Any

from dspark_megatron.model.draft_model import DSparkDraftModel

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
