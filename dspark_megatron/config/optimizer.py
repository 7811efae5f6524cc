"""The section `optimizer`."""

from dataclasses import dataclass, field
from typing import Literal

from dspark_megatron.config.rules import not_negative, positive
from dspark_megatron.config.schedule import LearningRateScales, check_schedule
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and the schedule of its learning rate."""

    lr: float = 6e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a share of the peak."""
    warmup_ratio: float = 0.04
    """Share of the iterations in which the rate rises linearly to the peak. The first step's
    rate is peak / warm-up steps."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the rate goes on after warm-up: it falls to the final one over all iterations, it stays,
    or it stays and falls at the end (`wsd`: warm-up, stable, decay)."""
    decay_ratio: float | None = None
    """Of `wsd`: share of the iterations, at the end, in which the rate falls. Null is 0.2."""
    decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] | None = None
    """Of `wsd`: how it falls, by Megatron's names. Null is `linear`."""
    lr_scale: LearningRateScales = field(default_factory=LearningRateScales)
    """By part of the draft: what its learning rate is multiplied by. A run keeps them."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Largest gradient norm. With 0 gradients are not clipped."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state and fp32 main weights over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce each bucket of gradients over data-parallel ranks as soon as it is full, while the
    backward pass of the step's last micro-batch still runs."""
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to the fp32 buckets inside the matrix product. This needs a GPU and
    Apex's extension `fused_weight_gradient_mlp_cuda`."""

    def validate(self) -> None:
        positive("optimizer", self, "lr", "adam_eps")
        for name in ("min_lr_ratio", "warmup_ratio"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.{name} ({value}) must be in [0, 1]")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} ({value}) must be in [0, 1)")
        not_negative("optimizer", self, "weight_decay", "clip_grad")
        check_schedule(self)
        self.lr_scale.validate()
