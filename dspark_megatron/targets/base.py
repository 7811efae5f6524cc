"""What a frozen target gives to the rest: states, never logits."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class TargetStates:
    """States of b sequences of s tokens, whole and equal on every tensor-parallel rank."""

    taps: Tensor
    """[b, s, m*h] outputs of the target layers, side by side in the order of their ids."""
    last_hidden: Tensor | None
    """[b, s, h] after the target's final norm; None from a target that was loaded for its taps
    alone."""


class Target(Protocol):
    """A frozen model, split over tensor-parallel ranks; all of them call together."""

    lockstep: bool
    """Whether data-parallel ranks must call `states` equally often, too: the weights, or tokens on
    their way to experts, travel between them."""

    def states(self, input_ids: Tensor) -> TargetStates:
        """States of right-padded sequences. input_ids [b, s]. No gradient."""

    def new_cache(self) -> Any:
        """An empty key/value cache for one sequence."""

    def extend(self, input_ids: Tensor, cache: Any) -> TargetStates:
        """States of the next tokens [1, q] of the cached sequence; the cache takes them in."""

    def forget(self, cache: Any, tokens: int) -> None:
        """Settle the cache after `extend`: drop the last `tokens` (>= 0) of its tokens."""
