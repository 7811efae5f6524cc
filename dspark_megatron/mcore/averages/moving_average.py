"""Exponential moving average of a draft's weights, in fp32 beside the main weights that it is of:
a rank averages what it owns.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dspark_megatron.config import OptimizerConfig
from dspark_megatron.mcore.averages.main_weights import main_weights


class MovingAverage:
    """Begins as a copy of the weights; each step takes it to `d average + (1 - d) weights`."""

    def __init__(self, decay: float, optimizer: Any, draft: torch.nn.Module) -> None:
        """optimizer: of `build_optimizer`, whose main weights are those of the draft."""
        self._places = main_weights(optimizer, draft)
        self._move = get_ema_multi_avg_fn(decay)
        self._values = [[x.clone() for x in place.tensors] for place in self._places]

    @classmethod
    def of(
        cls, config: OptimizerConfig, optimizer: Any, draft: torch.nn.Module
    ) -> "MovingAverage | None":
        """None where the config asks for none."""
        if config.ema_decay is None:
            return None
        return cls(config.ema_decay, optimizer, draft)

    def move(self) -> None:
        """To the weights as they are after a step. No collective."""
        for place, values in zip(self._places, self._values, strict=True):
            if values:
                self._move(values, place.tensors, None)

    def restart(self) -> None:
        """From the weights as they are now. No collective."""
        for place, values in zip(self._places, self._values, strict=True):
            for value, weight in zip(values, place.tensors, strict=True):
                value.copy_(weight)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of the average of each trained parameter, by name: fp32, one at a time.
        Every rank takes all of them. Collectives: those of `MainWeights.parts`."""
        for place, values in zip(self._places, self._values, strict=True):
            yield from place.parts(values)

    def load(self, parts: Mapping[str, Tensor]) -> None:
        """Take an average from what `parts` gave at any layout. Collectives: those of
        `MainWeights.take`."""
        for place, values in zip(self._places, self._values, strict=True):
            place.take(values, parts)

    @contextlib.contextmanager
    def in_place_of_weights(self, draft: torch.nn.Module) -> Iterator[None]:
        """Within it the draft's trained parameters hold the average, in their own type. It takes a
        copy of them. Collectives: those of `parts`."""
        trained = {name: p for name, p in draft.named_parameters() if p.requires_grad}
        kept = {name: p.detach().clone() for name, p in trained.items()}
        try:
            _fill(trained, self.parts())
            yield
        finally:
            _fill(trained, kept.items())


@torch.no_grad()
def _fill(parameters: Mapping[str, Tensor], values: Any) -> None:
    for name, value in values:
        parameters[name].copy_(value)
