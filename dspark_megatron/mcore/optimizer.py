"""Megatron-Core's gradient buckets, optimizers and learning-rate schedule around a draft model."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    get_megatron_optimizer,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from dspark_megatron.config import OptimizerConfig
from dspark_megatron.mcore.muon import MuonOptimizer
from dspark_megatron.mcore.parameter_rates import rates_by_part

STYLES = {"wsd": "WSD"}
"""Schedules that have another name in Megatron-Core."""
DECAY_RATIO = 0.2
"""Of `wsd`, where the config leaves it open."""


def wrap_data_parallel(model: MegatronModule, config: OptimizerConfig) -> Any:
    """fp32 gradient buckets, summed (not averaged) over data-parallel ranks: the loss is already
    divided by the weight of the whole step. Megatron-Core's own search for NaN, which ends the run
    and waits for the device once a bucket, is off; see `gradient_size`."""
    return DistributedDataParallel(
        config=model.config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.splits_buckets,
            overlap_grad_reduce=config.overlap_grad_reduce,
            check_for_nan_in_grad=False,
        ),
        module=model,
    )


def build_optimizer(config: OptimizerConfig, model: Any, dtype: torch.dtype) -> MegatronOptimizer:
    """AdamW with fp32 main weights, or Muon for the matrices and AdamW for the rest; `model` is the
    data-parallel wrapper."""
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
        use_distributed_optimizer=config.splits_buckets,
    )
    muons = list(model.module.split_matrices()) if config.name == "muon" else []
    with _without_gradient(model.module, muons):
        rest = get_megatron_optimizer(
            megatron_config,
            [model],
            config_overrides=rates_by_part(config, megatron_config),
            use_gloo_process_groups=False,
        )
    if not muons:
        return rest
    muon = MuonOptimizer(config, megatron_config, model)
    muon.grad_stats_parallel_group = rest.get_grad_stats_parallel_group()
    return ChainedOptimizer([*rest.chained_optimizers, muon])


@contextlib.contextmanager
def _without_gradient(module: MegatronModule, names: list[str]) -> Iterator[None]:
    """Within it Megatron-Core passes over the parameters of these names."""
    chosen = [module.get_parameter(name) for name in names]
    for parameter in chosen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(True)


def gradient_size(model: Any) -> Tensor:
    """[] norm of what the gradient buckets of this rank hold after the reduction, replicated
    parameters included; finite unless a gradient is not, or is so large that its square is not.
    `model` is the data-parallel wrapper. No collective, and the host does not wait."""
    buffers = model.buffers + model.expert_parallel_buffers
    norms = [torch.linalg.vector_norm(buffer.grad_data) for buffer in buffers]
    return torch.stack(norms).sum()


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The norm that `optimizer.step` clips by. Collective; the host waits for the device."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def make_state(optimizer: Any) -> None:
    """Give an optimizer that has taken no step its state, all zeros: Megatron-Core cannot save it
    without. One that has taken a step stays as it is."""
    for one in optimizer.chained_optimizers:
        if one.optimizer is None:  # this rank has no share of the parameters
            continue
        if isinstance(one, MuonOptimizer):  # it has its state from the start
            continue
        one.init_state_fn(one.optimizer, one.config)
        for group in one.optimizer.param_groups:
            group.setdefault("step", 0)


def build_scheduler(
    config: OptimizerConfig, optimizer: MegatronOptimizer, steps: int, *, unit: int = 1
) -> OptimizerParamScheduler:
    """Linear warm-up over `int(warmup_ratio * steps)` steps, then the schedule: to the minimum at
    the last step, or at the peak to the end.

    Stepped before the optimizer by `unit` each time, so the first rate is peak / warm-up steps, and
    the state is nothing but how far the run is.
    """
    warmup = min(int(config.warmup_ratio * steps), steps - 1)
    decay = max(1, int((config.decay_ratio or DECAY_RATIO) * steps))
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lr * (1.0 if config.schedule == "constant" else config.min_lr_ratio),
        lr_warmup_steps=unit * warmup,
        lr_decay_steps=unit * steps,
        lr_decay_style=STYLES.get(config.schedule, config.schedule),
        wsd_decay_steps=unit * min(decay, steps - warmup),
        lr_wsd_decay_style=config.decay_shape,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=unit * steps,
        wd_incr_style="constant",
    )
