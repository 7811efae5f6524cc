"""The section `loss`."""

from dataclasses import dataclass, field
from typing import Literal

from dspark_megatron.config.objective.terms import LossTerms, LossWeighting
from dspark_megatron.config.rules import not_negative, positive
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class LossConfig:
    """Weights and form of the training objective (paper Eq. 9-12)."""

    preset: Literal[
        "deepspec", "modelopt", "specforge", "speculators", "speculators_kl", "dpace", "dpard"
    ] = "deepspec"
    """The training code or method whose semantics the other keys follow unless they are given:
    `deepspec` (the paper's checkpoints), `modelopt`, `specforge`, `speculators` (as RedHat's drafts
    were trained), `speculators_kl` (its defaults), `dpace` or `dpard`. See
    `config/objective/presets.py`."""
    terms: LossTerms = field(default_factory=lambda: LossTerms(ce=0.1, l1=0.9))
    """Weights of the terms, by name. In a file `terms` is the whole set: a term that is left out
    weighs 0. On the command line `loss.terms.kl=0.5` changes one of them."""
    weighting: LossWeighting = field(default_factory=LossWeighting)
    """What a supervised slot weighs in the terms."""
    confidence_head_alpha: float = 1.0
    """Weight of the confidence head's binary cross entropy."""
    confidence_weights: Literal["decay", "reach"] = "decay"
    """What a slot weighs in the confidence head's loss. `decay`: exp(-k / loss_decay_gamma).
    `reach`: the chance that a round gets there, the product of the accept rates of the slots
    before."""
    confidence_stop_gradient: bool = False
    """Let the confidence head's loss train that head alone, and neither the backbone nor the
    Markov head."""
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
    normalization: Literal["global_step", "global_samples", "deepspec", "local", "local_count"] = (
        "global_step"
    )
    """`global_step`: sums over all samples of the step, divided once by the sum of the weights.
    `global_samples`: the same sums, divided by the number of samples of the step, those without a
    slot to learn included.
    `deepspec`: the mean over micro-batches of their weighted means. `local`: the mean over
    micro-batches and data-parallel ranks of their weighted means. `local_count`: as `local`, but
    divided by the number of supervised slots instead of their weights. With the last three the
    result depends on the layout. The weights of `weighting: dpace` and `dpard` come out of the
    forward pass; with them each supervised slot counts as 1 in the divisor."""
    memory_budget_mb: int = 256
    """MiB that the logits of the head loss may take on a rank. It decides how many slots a chunk
    has. The workspace of elementwise passes (tens of MiB) and the gradient of `markov_w2` come on
    top."""
    chunk_rows: int | None = None
    """Slots whose logits exist at one time in the head loss. Null takes as many as the budget
    allows. With `weighting` `dpace` or `dpard` whole blocks share a chunk, and there is room for
    one block at least."""
    compile: bool | None = None
    """Fuse the elementwise part of the head loss with torch.compile. Null fuses on a GPU, where it
    is faster, and not on a CPU, where it is not."""

    def validate(self) -> None:
        self.terms.validate()
        self.weighting.validate()
        not_negative("loss", self, "confidence_head_alpha")
        require(
            self.loss_decay_gamma is None or self.loss_decay_gamma > 0,
            f"loss.loss_decay_gamma ({self.loss_decay_gamma}) must be > 0, or null for no decay",
        )
        positive("loss", self, "memory_budget_mb", "chunk_rows")

    def is_compiled(self, device_type: str) -> bool:
        return device_type == "cuda" if self.compile is None else self.compile

    def needs_target_logits(self, *, with_confidence_head: bool) -> bool:
        """Whether any term compares with the target's distribution."""
        return (
            self.terms.compare_with_target
            or self.weighting.name == "dpard"
            or self.ce_labels == "target_argmax"
            or (with_confidence_head and self.confidence_head_alpha > 0)
        )
