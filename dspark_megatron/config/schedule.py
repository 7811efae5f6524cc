"""How the learning rate goes, over a run and by part of the draft."""

from dataclasses import dataclass
from typing import Any

from dspark_megatron.config.rules import positive
from dspark_megatron.errors import require

DECAY_RATIO, DECAY_SHAPE = 0.2, "linear"
"""Of `wsd` where they are not given."""


@dataclass(kw_only=True)
class LearningRateScales:
    """What the learning rate of a part is multiplied by; that of all else is `optimizer.lr`."""

    context: float = 1.0
    """Of what reads the taps: `fc` and its norm."""
    markov_head: float = 1.0
    confidence_head: float = 1.0

    def validate(self) -> None:
        positive("optimizer.lr_scale", self, "context", "markov_head", "confidence_head")


def check_schedule(optimizer: Any) -> None:
    """ConfigError for settings that the schedule of this section does not use."""
    name = optimizer.schedule
    for key in ("decay_ratio", "decay_shape"):
        require(
            name == "wsd" or getattr(optimizer, key) is None,
            f"optimizer.{key} ({getattr(optimizer, key)}) is of optimizer.schedule=wsd, and it is "
            f"{name}; leave it out, or set wsd",
        )
    require(
        name != "constant" or optimizer.min_lr_ratio == 0,
        f"optimizer.min_lr_ratio ({optimizer.min_lr_ratio}) is never reached with "
        "optimizer.schedule=constant; leave it out, or choose a schedule that falls",
    )
    if name == "wsd":
        share, warmup = decay_ratio(optimizer), optimizer.warmup_ratio
        require(0 < share <= 1, f"optimizer.decay_ratio ({share}) must be in (0, 1]")
        require(
            warmup + share <= 1,
            f"optimizer.warmup_ratio ({warmup}) and optimizer.decay_ratio ({share}) must be at "
            "most 1 together",
        )


def decay_ratio(optimizer: Any) -> float:
    """The share of the iterations in which the rate of `wsd` falls."""
    return DECAY_RATIO if optimizer.decay_ratio is None else optimizer.decay_ratio
