"""Learning rates by part of the draft, as Megatron-Core's settings of parameter groups."""

from dataclasses import asdict
from typing import Any

from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey

from dspark_megatron.config import OptimizerConfig

_PREFIXES = {
    "context": ("fc.", "hidden_norm."),
    "markov_head": ("markov_head.",),
    "confidence_head": ("confidence_head.",),
}
"""Of the names of a part's parameters."""


def scale_of(config: OptimizerConfig, name: str) -> float:
    """What the learning rate of the parameter of this name is multiplied by."""
    name = name.removeprefix("module.")  # of the data-parallel wrapper
    for part, scale in asdict(config.lr_scale).items():
        if name.startswith(_PREFIXES[part]):
            return scale
    return 1.0


def rates(config: OptimizerConfig, scale: float) -> dict[str, Any]:
    """What a parameter group with this scale has. The scheduler goes by the two rates; by
    `lr_mult` Megatron-Core 0.16 tells groups of a checkpoint apart."""
    peak = scale * config.lr
    return {"lr_mult": scale, "max_lr": peak, "min_lr": peak * config.min_lr_ratio}


def rates_by_part(
    config: OptimizerConfig, megatron_config: MegatronOptimizerConfig
) -> dict[ParamKey, Any] | None:
    """Megatron-Core's own settings of groups, and those of the parts whose scale is not 1; None
    (its own alone) where there is no such part."""
    scales = {part: scale for part, scale in asdict(config.lr_scale).items() if scale != 1}
    if not scales:
        return None
    found: dict[ParamKey, Any] = dict(get_standard_config_overrides(megatron_config))
    for part, scale in scales.items():
        found[ParamKey(name=_patterns(part))] = rates(config, scale)
    return found


def _patterns(part: str) -> Any:
    """Names with those of wrappers, if any, before them."""
    return tuple(
        pattern for prefix in _PREFIXES[part] for pattern in (f"{prefix}*", f"module.{prefix}*")
    )
