"""The section `optimizer`."""

from dataclasses import dataclass, field
from typing import Literal

from dspark_megatron.config.lr_scale import LearningRateScales
from dspark_megatron.config.rules import not_negative, positive
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW or Muon, with linear warm-up and a schedule after it."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: for the matrices of the backbone and of the Markov head's latent; AdamW for the rest.
    A run keeps the one that it began with."""
    lr: float = 6e-4
    """Peak learning rate, of both: Muon's updates are scaled to the size that AdamW's have."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a share of the peak."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the rate goes on after the warm-up. `cosine` and `linear` fall to the minimum, `constant`
    stays at the peak, and `wsd` (warm-up, stable, decay) stays there until its last part."""
    decay_ratio: float | None = None
    """Share of the iterations in which the rate of `wsd` falls; null is 0.2, or what the
    warm-up leaves. Only for `wsd`."""
    decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "minus_sqrt"
    """How the rate of `wsd` falls, by Megatron-Core's names."""
    warmup_ratio: float = 0.04
    """Share of the iterations in which the rate rises linearly to the peak. The first step's
    rate is peak / warm-up steps."""
    lr_scale: LearningRateScales = field(default_factory=LearningRateScales)
    """By part of the draft, what its learning rate is multiplied by. A run keeps them."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_eps: float = 1e-8
    """Added to the denominator of AdamW's step."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    muon_momentum: float = 0.95
    """Nesterov's, of Muon."""
    muon_weight_decay: float | None = None
    """Of Muon's matrices. Null is `weight_decay`."""
    muon_steps: int = 5
    """Newton-Schulz iterations in a step of Muon."""
    ema_decay: float | None = None
    """Each step takes a moving average of the weights to `d average + (1 - d) weights`, d being
    this. Training does not depend on it. Null: there is no average."""
    clip_grad: float = 1.0
    """Largest gradient norm. With 0 gradients are not clipped."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state and fp32 main weights over data-parallel ranks; with Muon those of its
    matrices, and every rank keeps AdamW's."""
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
        self._validate_schedule()
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} ({value}) must be in [0, 1)")
        not_negative("optimizer", self, "weight_decay", "clip_grad")
        decay = self.ema_decay
        require(
            decay is None or 0 < decay < 1,
            f"optimizer.ema_decay ({decay}) must be > 0 and < 1, such as 0.999, or null",
        )
        self.lr_scale.validate()
        self._validate_muon()

    def _validate_schedule(self) -> None:
        require(
            self.decay_ratio is None or self.schedule == "wsd",
            f"optimizer.decay_ratio ({self.decay_ratio}) is of the schedule wsd, and "
            f"optimizer.schedule is {self.schedule!r}; set optimizer.schedule=wsd or leave it out",
        )
        require(
            self.decay_shape == OptimizerConfig.decay_shape or self.schedule == "wsd",
            f"optimizer.decay_shape ({self.decay_shape}) is of the schedule wsd, and "
            f"optimizer.schedule is {self.schedule!r}; set optimizer.schedule=wsd or leave it out",
        )
        require(
            self.schedule != "constant" or self.min_lr_ratio == 0,
            f"optimizer.min_lr_ratio ({self.min_lr_ratio}) is where a rate falls to, and with "
            "optimizer.schedule=constant it does not fall; leave it out",
        )
        ratio = self.decay_ratio
        require(
            ratio is None or (0 < ratio and ratio + self.warmup_ratio <= 1),
            f"optimizer.decay_ratio ({ratio}) must be > 0, and with optimizer.warmup_ratio "
            f"({self.warmup_ratio}) at most 1; lower either",
        )

    def _validate_muon(self) -> None:
        require(
            0 <= self.muon_momentum < 1,
            f"optimizer.muon_momentum ({self.muon_momentum}) must be in [0, 1)",
        )
        if self.muon_weight_decay is not None:
            not_negative("optimizer", self, "muon_weight_decay")
        require(
            1 <= self.muon_steps < 100,  # PyTorch's own bound
            f"optimizer.muon_steps ({self.muon_steps}) must be from 1 to 99",
        )
        for name in ("muon_momentum", "muon_weight_decay", "muon_steps"):
            value = getattr(self, name)
            require(
                self.name == "muon" or value == getattr(OptimizerConfig, name),
                f"optimizer.{name} ({value}) is of Muon, and optimizer.name is {self.name!r}; set "
                "optimizer.name=muon or leave it out",
            )

    @property
    def splits_buckets(self) -> bool:
        """Whether each data-parallel rank gets a part of the reduced gradients. Muon needs whole
        matrices, and has its own way to share out state."""
        return self.use_distributed_optimizer and self.name == "adamw"
