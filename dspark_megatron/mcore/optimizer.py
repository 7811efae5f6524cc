"""Megatron-Core's gradient buckets, AdamW and learning-rate schedule around a draft model."""

from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from dspark_megatron.config import OptimizerConfig


def wrap_data_parallel(model: MegatronModule, config: OptimizerConfig) -> Any:
    """fp32 gradient buckets, summed (not averaged) over data-parallel ranks: the loss is already
    divided by the weight of the whole step."""
    return DistributedDataParallel(
        config=model.config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.use_distributed_optimizer,
            overlap_grad_reduce=config.overlap_grad_reduce,
            check_for_nan_in_grad=True,
        ),
        module=model,
    )


def build_optimizer(config: OptimizerConfig, model: Any, dtype: torch.dtype) -> MegatronOptimizer:
    """AdamW with fp32 main weights; `model` is the data-parallel wrapper."""
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.lr * config.min_lr_ratio,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.use_distributed_optimizer,
    )
    return get_megatron_optimizer(megatron_config, [model], use_gloo_process_groups=False)


def build_scheduler(
    config: OptimizerConfig, optimizer: MegatronOptimizer, steps: int, *, unit: int = 1
) -> OptimizerParamScheduler:
    """Linear warm-up over `int(warmup_ratio * steps)` steps, then cosine to the minimum.

    Stepped before the optimizer by `unit` each time, so the first rate is peak / warm-up steps, and
    the state is nothing but how far the run is.
    """
    warmup = min(int(config.warmup_ratio * steps), steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lr * config.min_lr_ratio,
        lr_warmup_steps=unit * warmup,
        lr_decay_steps=unit * steps,
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=unit * steps,
        wd_incr_style="constant",
    )
