"""What decoding leaves behind: answers, and the rounds that made them."""

from dataclasses import dataclass, field


@dataclass
class Round:
    """One draft and what became of it."""

    proposed: int
    """Draft tokens that were judged (fewer than were verified when a stop token ended it)."""
    accepted: int
    """Draft tokens that the target kept."""
    bonus: bool
    """Whether the target added a token of its own."""
    context: int = 0
    """Tokens that the draft was made from, all before its anchor."""
    confidence_logits: list[float] = field(default_factory=list)
    """Of every slot that was drafted, also where the draft was cut; empty without the head."""
    accept_rate: list[float] = field(default_factory=list)
    """Overlap of the draft's and the target's distribution at each slot that was verified."""

    @property
    def length(self) -> int:
        return self.accepted + self.bonus


@dataclass
class Generation:
    """A decoded answer."""

    token_ids: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)


@dataclass
class Decoded:
    """Answers to several prompts, in their order."""

    generations: list[Generation]
    seconds: float
    """Time of all rounds together, without the forward passes of the prompts."""
