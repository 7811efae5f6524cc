"""Sums and weights of a run's metrics: added over data-parallel ranks and divided once, here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.config.objective.terms import TERMS

SCALARS = (
    "loss_sum",
    "divisor",
    *(f"{term}_sum" for term in TERMS),
    "confidence_sum",
    "confidence_error_sum",
    "confidence_bias_sum",
    "weight",
    "tau_sum",
    "blocks",
    "slots",
    "candidates",
    "samples",
    "tokens",
    "positions",
    "padding",
    "flops",
)
"""Numerators and denominators, in the order they travel."""


@dataclass
class MetricSums:
    """Sums over micro-batches; `scalars` by name, accept rates by slot."""

    scalars: dict[str, Tensor]
    accept_sum: Tensor
    """[d] sum of accept rates of supervised slots."""
    accept_count: Tensor
    """[d] supervised slots."""

    @classmethod
    def zeros(cls, num_draft_tokens: int, device: torch.device) -> "MetricSums":
        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        return cls(
            {name: zeros() for name in SCALARS}, zeros(num_draft_tokens), zeros(num_draft_tokens)
        )

    def add(self, **terms: Tensor | float) -> None:
        """Add to named scalars or to the per-slot sums."""
        for name, value in terms.items():
            total = getattr(self, name) if name.startswith("accept_") else self.scalars[name]
            total += value

    def reduced(self, *, dp_group: dist.ProcessGroup) -> "MetricSums":
        """The sums over all data-parallel ranks: one all-reduce of 23 + 2d doubles."""
        packed = self.packed()
        if dp_group.size() > 1:
            dist.all_reduce(packed, group=dp_group)
        return MetricSums.unpacked(packed)

    def packed(self) -> Tensor:
        """All sums as one vector of 23 + 2d doubles, to travel or to be kept."""
        scalars = torch.stack([self.scalars[name] for name in SCALARS])
        return torch.cat([scalars, self.accept_sum, self.accept_count])

    def continued(self, kept: Sequence[float]) -> "MetricSums":
        """New sums that go on from what was packed; from nothing where that is of another set of
        metrics, of an older version, or has values that are not finite."""
        if len(kept) != self.packed().numel() or not all(map(math.isfinite, kept)):
            return self
        packed = torch.tensor(kept, dtype=torch.float64, device=self.accept_sum.device)
        metrics = MetricSums.unpacked(packed)
        for name in ("tokens", "flops"):  # the clock starts anew, too
            metrics.scalars[name].zero_()
        return metrics

    def restore(self, packed: Tensor) -> None:
        """Go back to what was packed before."""
        old = MetricSums.unpacked(packed)
        for total, kept in zip(self._totals(), old._totals(), strict=True):
            total.copy_(kept)

    def _totals(self) -> list[Tensor]:
        return [*self.scalars.values(), self.accept_sum, self.accept_count]

    @classmethod
    def unpacked(cls, packed: Tensor) -> "MetricSums":
        k = (packed.numel() - len(SCALARS)) // 2
        scalars, accept_sum, accept_count = packed.split([len(SCALARS), k, k])
        return cls(dict(zip(SCALARS, scalars.clone(), strict=True)), accept_sum, accept_count)

    def ratios(self, weights: dict[str, float]) -> dict[str, tuple[Tensor, Tensor]]:
        """Numerator and denominator of each mean that is shown; of `accept_rate` by slot. weights:
        of the terms in use, by name."""
        s = self.scalars
        ratios = {
            "loss": (s["loss_sum"], s["divisor"]),
            **{f"{name}_loss": (s[f"{name}_sum"], s["weight"]) for name in weights},
            "sampler/anchors_per_sample": (s["blocks"], s["samples"]),
            "sampler/candidates_per_sample": (s["candidates"], s["samples"]),
            "sampler/supervised_slots_per_block": (s["slots"], s["blocks"]),
            "sampler/padding_share": (s["padding"], s["positions"]),
        }
        if "l1" in weights:
            ratios["tau"] = s["tau_sum"], s["blocks"]
            ratios["accept_rate"] = self.accept_sum, self.accept_count
        if "confidence" in weights:
            ratios["confidence_abs_error"] = s["confidence_error_sum"], s["weight"]
            ratios["confidence_bias"] = s["confidence_bias_sum"], s["weight"]
        return ratios

    def means(self, weights: dict[str, float]) -> dict[str, float | list[float] | None]:
        """What a log line shows. A mean without weight is null, not zero. The host waits for the
        device once."""
        on_host = MetricSums.unpacked(self.packed().cpu())
        return {name: _mean(*ratio) for name, ratio in on_host.ratios(weights).items()}


def _mean(numerator: Tensor, denominator: Tensor) -> float | list[float] | None:
    if denominator.dim() and denominator.any():
        return (numerator / denominator.clamp(min=1)).tolist()
    return (numerator / denominator).item() if denominator.any() else None
