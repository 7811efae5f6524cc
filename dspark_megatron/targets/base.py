"""What a frozen target gives to the rest: states, never logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dspark_megatron.data.batch import Batch


@dataclass(frozen=True)
class TargetStates:
    """States of b sequences of s tokens, whole and equal on every tensor-parallel rank."""

    taps: Tensor
    """[b, s, m*h] outputs of the target layers, side by side in the order of their ids."""
    last_hidden: Tensor | None
    """[b, s, h] after the target's final norm; None from a target that was loaded for its taps
    alone."""
    positions: int | None = None
    """Positions that the target computed for them, padding included; None of a target that
    computes nothing."""

    @property
    def hidden(self) -> Tensor:
        """`last_hidden`, where there must be one."""
        assert self.last_hidden is not None, "the target was loaded for its taps alone"
        return self.last_hidden


class StatesSource(Protocol):
    """What training takes states from: a target that makes them, or files that store them. All
    tensor-parallel ranks call together."""

    lockstep: bool
    """Whether data-parallel ranks must call `states` equally often, too: the weights, or tokens on
    their way to experts, travel between them."""

    def expect(self, batches: Sequence[Batch]) -> None:
        """Called before `states` of several batches, in their order: stored states are read ahead,
        and pipeline stages run them together."""
        return None

    def states(self, batch: Batch) -> TargetStates:
        """States of its samples, without gradient; those of padding that is left out are 0."""


class Target(StatesSource, Protocol):
    """A frozen model, split over tensor-parallel ranks."""

    device: torch.device
    """Where its states are."""
    dtype: torch.dtype
    """That of its weights, and so of its states."""


class DecodingTarget(Target, Protocol):
    """One that takes sequences in piece by piece."""

    def new_cache(self) -> Any:
        """A key/value cache of no sequence."""

    def add_sequence(self, input_ids: Tensor, cache: Any) -> TargetStates:
        """States of a sequence [1, s]; the cache takes it in behind those it has."""

    def extend(self, input_ids: Tensor, cache: Any) -> TargetStates:
        """States of the next tokens [b, q] of every cached sequence; the cache takes them in.
        One that has fewer is padded on the right, and the padding forgotten afterwards."""

    def forget(self, cache: Any, tokens: list[int]) -> None:
        """Settle the cache after `extend`: drop the last `tokens` (>= 0) of each sequence."""

    def keep(self, cache: Any, sequences: list[int]) -> None:
        """Drop all sequences but these, in this order."""
