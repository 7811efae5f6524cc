"""The section `loss`."""

from dataclasses import dataclass
from typing import Literal

from dspark_megatron.config.rules import not_negative, positive
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class LossConfig:
    """Weights and form of the training objective (paper Eq. 9-12)."""

    preset: Literal["deepspec", "modelopt", "speculators"] = "deepspec"
    """The training code whose semantics the other keys follow unless they are given: `deepspec`
    (the paper's checkpoints), `modelopt` or `speculators`. See `config/presets.py`."""
    ce_loss_alpha: float = 0.1
    """Weight of the cross entropy with the labels."""
    l1_loss_alpha: float = 0.9
    """Weight of the raw L1 distance (0..2) to the target's distribution."""
    tvd_loss_alpha: float = 0.0
    """Weight of the total variation distance, which is half of L1: the same term in speculators'
    unit. Giving one of the two sets the other to 0."""
    kl_loss_alpha: float = 0.0
    """Weight of the forward divergence KL(target || draft) in nats."""
    confidence_head_alpha: float = 1.0
    """Weight of the confidence head's binary cross entropy."""
    loss_decay_gamma: float | None = 4.0
    """Slot k, counted from 0, weighs exp(-k / loss_decay_gamma). Null means no decay."""
    ce_labels: Literal["data", "target_argmax"] = "data"
    """Labels of the cross entropy: `data` is the next token of the sample, `target_argmax` the
    target's most likely token there."""
    anchor_rule: Literal["label", "token"] = "label"
    """Which positions may be anchors. `label`: tokens in the loss mask whose next token is in it,
    too. `token`: all tokens in the loss mask; a block may then have no supervised slot."""
    supervised_slots: Literal["prefix", "all"] = "prefix"
    """Which slots of a block are learnt. `prefix`: those before the first that is not in the loss
    mask. `all`: also those after such a gap."""
    slot_mask: Literal["label", "input"] = "label"
    """Whether a slot is in the loss mask is decided by its `label`, or by its `input`, one token
    before. With `input` one token past the end of an answer is learnt. With
    `model.sample_from_anchor: false` input and label of a slot stand at one place: only `label`."""
    normalization: Literal["global_step", "deepspec", "local", "local_count"] = "global_step"
    """`global_step`: sums over all samples of the step, divided once by the sum of the weights.
    `deepspec`: the mean over micro-batches of their weighted means. `local`: the mean over
    micro-batches and data-parallel ranks of their weighted means. `local_count`: as `local`, but
    divided by the number of supervised slots instead of their weights. With all but the first the
    result depends on the layout."""
    memory_budget_mb: int = 256
    """MiB that the logits of the head loss may take on a rank. It decides how many slots a chunk
    has. The workspace of elementwise passes (tens of MiB) and the gradient of `markov_w2` come on
    top."""
    chunk_rows: int | None = None
    """Slots whose logits exist at one time in the head loss. Null takes as many as the budget
    allows."""
    compile: bool | None = None
    """Fuse the elementwise part of the head loss with torch.compile. Null fuses on a GPU, where it
    is faster, and not on a CPU, where it is not."""

    def validate(self) -> None:
        not_negative("loss", self, "ce_loss_alpha", "l1_loss_alpha", "tvd_loss_alpha")
        not_negative("loss", self, "kl_loss_alpha", "confidence_head_alpha")
        require(
            not (self.l1_loss_alpha and self.tvd_loss_alpha),
            f"loss.l1_loss_alpha ({self.l1_loss_alpha}) and loss.tvd_loss_alpha "
            f"({self.tvd_loss_alpha}) weigh one term (tvd is half of l1); set either to 0",
        )
        require(
            self.loss_decay_gamma is None or self.loss_decay_gamma > 0,
            f"loss.loss_decay_gamma ({self.loss_decay_gamma}) must be > 0, or null for no decay",
        )
        positive("loss", self, "memory_budget_mb", "chunk_rows")

    def is_compiled(self, device_type: str) -> bool:
        return device_type == "cuda" if self.compile is None else self.compile

    @property
    def l1_weight(self) -> float:
        """Weight of the raw L1 distance, under whichever name it was given."""
        return self.l1_loss_alpha + self.tvd_loss_alpha / 2

    def needs_target_logits(self, *, with_confidence_head: bool) -> bool:
        """Whether any term compares with the target's distribution."""
        return (
            self.l1_weight > 0
            or self.kl_loss_alpha > 0
            or self.ce_labels == "target_argmax"
            or (with_confidence_head and self.confidence_head_alpha > 0)
        )
