"""What running the frozen target takes, whichever way it was found."""

from dataclasses import dataclass, field

from dspark_megatron.planning.observing.work import Work

LAYER = "states of a target layer"
"""And of layers before it, as far as they are still there."""
GATHERED = "gathered target layer"
"""Weights of other ranks: as they arrive, as they are used, and the layer's before."""
CACHE = "target's keys and values"

OUTPUTS = "target's outputs, tensor-parallel"
SHARDS = "target's weights, between their shards"
TOKENS = "target's tokens, to their experts"


@dataclass(frozen=True)
class TargetPass:
    """Of one rank and one batch, in as many forward passes as it takes."""

    moments: dict[str, dict[str, int]] = field(default_factory=dict)
    """Bytes beside the weights at the highest point of each forward pass, and while their states
    are put together, by what holds them. The states that the target gives are among them."""
    work: Work = field(default_factory=Work)
    kept: int = 0
    """Bytes that a first pass leaves for those that follow: buffers, and what routers remember."""
    by_formula: tuple[str, ...] = ()
    """Sentences: what was not observed, and why."""

    @property
    def highest(self) -> dict[str, int]:
        return max(self.moments.values(), key=lambda parts: sum(parts.values()), default={})
