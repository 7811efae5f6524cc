"""The keys `optimizer.lr_scale.*`."""

from dataclasses import dataclass

from dspark_megatron.config.rules import positive


@dataclass(kw_only=True)
class LearningRateScales:
    """What the learning rate of a part is multiplied by; that of all else is `optimizer.lr`."""

    context: float = 1.0
    """Of what reads the taps: `fc` and its norm."""
    markov_head: float = 1.0
    """Of the Markov head."""
    confidence_head: float = 1.0
    """Of the confidence head."""

    def validate(self) -> None:
        positive("optimizer.lr_scale", self, "context", "markov_head", "confidence_head")
