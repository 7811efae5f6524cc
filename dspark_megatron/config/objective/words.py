"""The objective of a run in one line, for people."""

from dspark_megatron.config.objective.loss import LossConfig


def objective_words(loss: LossConfig, *, with_confidence_head: bool) -> str:
    """Terms, what slots weigh in them, the confidence head's loss, and the divisor."""
    terms = terms_words(loss, with_confidence_head=with_confidence_head)
    return f"{terms}; normalization: {loss.normalization}; {_slots(loss)}"


def terms_words(loss: LossConfig, *, with_confidence_head: bool) -> str:
    """Terms, what slots weigh in them, and the confidence head's loss."""
    weights = {name: weight for name, weight in loss.terms.by_name.items() if weight > 0}
    terms = " + ".join(f"{weight:g} {name}" for name, weight in weights.items())
    parts = [f"({terms}) by {_weighting(loss)}"] if terms else []
    if with_confidence_head and loss.confidence_head_alpha > 0:
        by = "reach" if loss.confidence_weights == "reach" else _decay(loss)
        whom = ", of its head alone," if loss.confidence_stop_gradient else ""
        parts.append(f"{loss.confidence_head_alpha:g} confidence{whom} by {by}")
    return " + ".join(parts)


def _weighting(loss: LossConfig) -> str:
    name, alpha = loss.weighting.name, loss.weighting.alpha
    return _decay(loss) if name == "decay" else f"{name} with alpha {alpha:g}"


def _decay(loss: LossConfig) -> str:
    return "1" if loss.loss_decay_gamma is None else f"exp(-k/{loss.loss_decay_gamma:g})"


def _slots(loss: LossConfig) -> str:
    """The keys of anchors, slots and labels that are not the paper's."""
    names = ("ce_labels", "anchor_rule", "supervised_slots", "slot_mask")
    values = {name: getattr(loss, name) for name in names}
    other = [f"{name}: {x}" for name, x in values.items() if x != getattr(LossConfig, name)]
    return ", ".join(other) or "anchors, slots and labels as in DeepSpec"
