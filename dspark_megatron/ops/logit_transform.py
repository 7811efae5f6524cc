"""What a model does to the product of its head before a softmax: a scale, and a soft cap.

    y = cap(scale * x),  cap(x) = c * tanh(x / c)        dy/dx = scale * (1 - (y / c)^2)

Logits are changed in place, in fp32 (float64 for float64) whatever their type. The identity costs
nothing: no kernel, no copy.

Shapes: n slots, c slots of a chunk, f features, v/tp columns of this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_megatron.ops import logit_terms
from dspark_megatron.ops.chunk_budget import in_tiles
from dspark_megatron.ops.logit_terms import precise


@dataclass(frozen=True)
class LogitTransform:
    """`cap(scale * x)`. Both numbers must be finite, and the cap above 0."""

    scale: float = 1.0
    softcapping: float | None = None
    """c of `c * tanh(x / c)`; None does not cap."""

    @property
    def is_identity(self) -> bool:
        return self.scale == 1 and self.softcapping is None

    def at(self, temperature: float) -> "LogitTransform":
        """What gives the logits divided by a temperature."""
        c = self.softcapping
        return LogitTransform(self.scale / temperature, None if c is None else c / temperature)

    def apply_(self, logits: Tensor, *, compile: bool = False) -> Tensor:
        """[..., v/tp] in place; the same tensor comes back."""
        if self.softcapping is not None:
            return self._capped(logits, self.scale, compile)
        return logits if self.scale == 1 else logits.mul_(self.scale)

    def product(
        self, features: Tensor, weight: Tensor, out: Tensor | None = None, *, compile: bool = False
    ) -> Tensor:
        """`cap(scale * features weight^T)`: [c, f] and [v/tp, f] -> [c, v/tp], in `out` if given.
        The product scales before it rounds."""
        if self.scale == 1:
            logits = torch.mm(features, weight.t(), out=out)
        else:
            logits = features.new_empty(len(features), len(weight)) if out is None else out
            logits.addmm_(features, weight.t(), beta=0, alpha=self.scale)
        return logits if self.softcapping is None else self._capped(logits, 1.0, compile)

    def pull_back_(self, transformed: Tensor, gradient: Tensor, *, compile: bool = False) -> Tensor:
        """The gradient before the transform, written over `transformed` [c, v/tp], from the one
        after it, which stays."""
        c = self.softcapping
        if c is None:
            return torch.mul(gradient, self.scale, out=transformed)
        _run(pull_back, compile)(transformed, gradient, self.scale, c)
        return transformed

    def _capped(self, logits: Tensor, scale: float, compile: bool) -> Tensor:
        if logits.numel():
            _run(cap, compile)(logits.view(-1, logits.shape[-1]), scale, self.softcapping)
        return logits

    def describe(self) -> str:
        """As a formula."""
        scaled = "lm_head(x)" if self.scale == 1 else f"{self.scale:g} * lm_head(x)"
        c = self.softcapping
        return scaled if c is None else f"{c:g} * tanh({scaled} / {c:g})"


IDENTITY = LogitTransform()


class LogitFactors(NamedTuple):
    """Logits that are not made yet: `cap(scale * features weight^T)`."""

    features: Tensor
    """[n, f]"""
    weight: Tensor
    """[v/tp, f] of this rank."""
    transform: LogitTransform = IDENTITY
    uncapped: int = 0
    """Last columns of both, whose product is added after the transform: the Markov bias."""

    def product(
        self,
        rows: slice,
        out: Tensor,
        base: Tensor | None = None,
        *,
        temperature: float = 1.0,
        compile: bool = False,
    ) -> Tensor:
        """Logits of some rows, divided by a temperature, in `out` [c, columns]: of the first
        columns, if it has fewer than the weight. base [c, columns]: gets the transformed logits
        without what is added to them."""
        features, weight = self.features[rows], self.weight[: out.shape[1]]
        transform = self.transform.at(temperature)
        if base is None and (self.transform.is_identity or not self.uncapped):
            return transform.product(features, weight, out, compile=compile)
        width, base = features.shape[1] - self.uncapped, out if base is None else base
        transform.product(features[:, :width], weight[:, :width], base, compile=compile)
        if not self.uncapped:
            return out.copy_(base)
        bias = features[:, width:], weight[:, width:].t()
        return torch.addmm(base, *bias, alpha=1 / temperature, out=out)


@dataclass(frozen=True)
class TargetHead:
    """The target's LM head, and what the target does to its product."""

    weight: Tensor
    """[v/tp, h] of this rank."""
    transform: LogitTransform = IDENTITY

    def logits(self, last_hidden: Tensor) -> Tensor:
        """[..., h] after the final norm -> this rank's [..., v/tp], padding included. No
        collective."""
        *shape, h = last_hidden.shape
        rows = last_hidden.to(self.weight.dtype).reshape(-1, h)
        return self.transform.product(rows, self.weight).view(*shape, -1)

    def factors(self, last_hidden: Tensor) -> LogitFactors:
        """Of the target's logits; last_hidden [n, h]."""
        return LogitFactors(last_hidden.to(self.weight.dtype), self.weight, self.transform)


def _run(function: Callable, compile: bool) -> Callable:
    return logit_terms.compiled(function) if compile else in_tiles(function)


def cap(logits: Tensor, scale: float, c: float) -> None:
    """`c * tanh(scale * logits / c)` in place."""
    exact = logits.to(precise(logits.dtype))
    logits.copy_(exact.mul_(scale / c).tanh_().mul_(c))


def pull_back(transformed: Tensor, gradient: Tensor, scale: float, c: float) -> None:
    """The gradient before the transform, over what came out of it."""
    exact = transformed.to(precise(transformed.dtype))
    transformed.copy_(exact.square_().mul_(-scale / c**2).add_(scale).mul_(gradient))
