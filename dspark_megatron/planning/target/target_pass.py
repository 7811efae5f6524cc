"""What running the frozen target takes, whichever way it was found."""

from dataclasses import dataclass, field

from dspark_megatron.planning.work import Work

LAYER = "states of a target layer"
"""And of layers before it, as far as they are still there."""
GATHERED = "gathered target layer"
"""Weights of other ranks: as they arrive, as they are used, and the layer's before."""
CACHE = "target's keys and values"


@dataclass(frozen=True)
class TargetPass:
    """Of one rank, and of one batch in as many forward passes as it takes."""

    weights: int | None
    """Bytes that stay; None: not known."""
    highest: dict[str, int] = field(default_factory=dict)
    """Bytes beside them at the highest moment, by what holds them; among them the states that it
    gives."""
    work: Work = field(default_factory=Work)
    by_formula: tuple[str, ...] = ()
    """Sentences: what was not observed, and why."""
