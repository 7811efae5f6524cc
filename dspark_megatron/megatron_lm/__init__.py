"""A draft in Megatron-LM's `pretrain()`; docs/megatron_lm.md says how.

On a machine without a GPU `training.runtime.prepare_megatron()` must come before this is imported.
"""

from dspark_megatron.megatron_lm.arguments import add_dspark_args
from dspark_megatron.megatron_lm.launch import launch_pretrain
from dspark_megatron.megatron_lm.pretraining import (
    datasets_provider,
    forward_step,
    loss_func,
    model_provider,
)

__all__ = [
    "add_dspark_args",
    "datasets_provider",
    "forward_step",
    "launch_pretrain",
    "loss_func",
    "model_provider",
]
