"""The section `loss`."""

from dataclasses import dataclass

from dspark_megatron.config.rules import one_of, positive
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class LossConfig:
    """Weights and form of the training objective (paper Eq. 9-12)."""

    preset: str = "deepspec"
    """Whose semantics the keys left out take: `deepspec` (the paper's checkpoints), `modelopt` or
    `speculators`; `config/presets.py` has them."""
    ce_loss_alpha: float = 0.1
    """Weight of the cross entropy with the labels."""
    l1_loss_alpha: float = 0.9
    """Weight of the raw L1 distance (0..2) to the target's distribution."""
    tvd_loss_alpha: float = 0.0
    """Weight of the total variation distance, half of L1: the same term in speculators' unit.
    Naming one of the two sets the other to 0."""
    kl_loss_alpha: float = 0.0
    """Weight of the forward divergence KL(target || draft) in nats."""
    confidence_head_alpha: float = 1.0
    """Weight of the confidence head's binary cross entropy."""
    loss_decay_gamma: float | None = 4.0
    """Slot k weighs exp(-k / loss_decay_gamma), k from 0; null means no decay."""
    ce_labels: str = "data"
    """Labels of the cross entropy: `data` (the next token) or `target_argmax` (the token that the
    target holds most likely there)."""
    anchor_rule: str = "label"
    """Positions that may be anchors: `label` (a token in the loss mask whose next one is too) or
    `token` (any token in the loss mask; a block may then have no supervised slot)."""
    supervised_slots: str = "prefix"
    """Slots of a block that are learnt: `prefix` (up to the first that the mask leaves out) or
    `all` (also those after a gap)."""
    slot_mask: str = "label"
    """Whose place in the loss mask decides on a slot: its `label`'s or its `input`'s, one before
    (then one token past the end of an answer is learnt)."""
    normalization: str = "global_step"
    """`global_step`: sums over all samples of the step, divided once by the sum of weights.
    `deepspec`: a mean over micro-batches of their own weighted means.
    `local`: a mean over micro-batches and data-parallel ranks of each one's own weighted mean.
    `local_count`: as `local`, divided by the number of supervised slots, not by their weights.
    With all but the first, the layout is part of the mathematics."""
    memory_budget_mb: int = 256
    """MiB that the logits of the head loss may take on a rank; sets the rows of a chunk. The room
    of its elementwise passes (tens of MiB) and the gradient of `markov_w2` are not in it."""
    chunk_rows: int | None = None
    """Rows whose logits exist at one time in the head loss; null: as many as the budget holds."""
    compile: bool = False
    """Fuse the elementwise part of the head loss with torch.compile."""

    def validate(self) -> None:
        one_of("loss.preset", self.preset, ("deepspec", "modelopt", "speculators"))
        names = ("ce_loss", "l1_loss", "tvd_loss", "kl_loss", "confidence_head")
        for name in (f"{name}_alpha" for name in names):
            value = getattr(self, name)
            require(value >= 0, f"loss.{name} ({value}) must be >= 0")
        require(
            not (self.l1_loss_alpha and self.tvd_loss_alpha),
            f"loss.l1_loss_alpha ({self.l1_loss_alpha}) and loss.tvd_loss_alpha "
            f"({self.tvd_loss_alpha}) weigh one term (tvd is half of l1); set either to 0",
        )
        require(
            self.loss_decay_gamma is None or self.loss_decay_gamma > 0,
            f"loss.loss_decay_gamma ({self.loss_decay_gamma}) must be > 0, or null for no decay",
        )
        one_of("loss.ce_labels", self.ce_labels, ("data", "target_argmax"))
        one_of("loss.anchor_rule", self.anchor_rule, ("label", "token"))
        one_of("loss.supervised_slots", self.supervised_slots, ("prefix", "all"))
        one_of("loss.slot_mask", self.slot_mask, ("label", "input"))
        forms = ("global_step", "deepspec", "local", "local_count")
        one_of("loss.normalization", self.normalization, forms)
        positive("loss.memory_budget_mb", self.memory_budget_mb)
        if self.chunk_rows is not None:
            positive("loss.chunk_rows", self.chunk_rows)

    @property
    def l1_weight(self) -> float:
        """Weight of the raw L1 distance, whichever name it was given under."""
        return self.l1_loss_alpha + self.tvd_loss_alpha / 2

    def needs_target_logits(self, *, with_confidence_head: bool) -> bool:
        """Whether any term compares with the target's distribution."""
        return (
            self.l1_weight > 0
            or self.kl_loss_alpha > 0
            or self.ce_labels == "target_argmax"
            or (with_confidence_head and self.confidence_head_alpha > 0)
        )
