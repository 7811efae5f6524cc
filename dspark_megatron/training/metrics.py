"""Sums and weights of a run's metrics: added over data-parallel ranks and divided once, here."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

SCALARS = (
    "ce_sum",
    "l1_sum",
    "kl_sum",
    "confidence_sum",
    "confidence_error_sum",
    "confidence_bias_sum",
    "weight",
    "tau_sum",
    "blocks",
    "rows",
    "candidates",
    "samples",
    "tokens",
    "positions",
    "padding",
)
"""Numerators and denominators, in the order they travel."""


@dataclass
class MetricSums:
    """Sums over micro-batches; `scalars` by name, accept rates by slot."""

    scalars: dict[str, Tensor]
    accept_sum: Tensor
    """[k] sum of accept rates of supervised slots."""
    accept_count: Tensor
    """[k] supervised slots."""

    @classmethod
    def zeros(cls, block_size: int, device: torch.device) -> "MetricSums":
        zero = dict(dtype=torch.float64, device=device)
        scalars = {name: torch.zeros((), **zero) for name in SCALARS}
        return cls(scalars, torch.zeros(block_size, **zero), torch.zeros(block_size, **zero))

    def add(self, **terms: Tensor | float) -> None:
        """Add to named scalars or to the per-slot sums."""
        for name, value in terms.items():
            total = getattr(self, name) if name.startswith("accept_") else self.scalars[name]
            total += value

    def reduced(self, *, dp_group: dist.ProcessGroup) -> "MetricSums":
        """The sums over all data-parallel ranks: one all-reduce of 15 + 2k doubles."""
        packed = self.packed()
        if dp_group.size() > 1:
            dist.all_reduce(packed, group=dp_group)
        return MetricSums.unpacked(packed)

    def packed(self) -> Tensor:
        """All sums as one vector of 15 + 2k doubles, to travel or to be kept."""
        scalars = torch.stack([self.scalars[name] for name in SCALARS])
        return torch.cat([scalars, self.accept_sum, self.accept_count])

    @classmethod
    def unpacked(cls, packed: Tensor) -> "MetricSums":
        k = (packed.numel() - len(SCALARS)) // 2
        scalars, accept_sum, accept_count = packed.split([len(SCALARS), k, k])
        return cls(dict(zip(SCALARS, scalars.clone(), strict=True)), accept_sum, accept_count)

    def means(self, weights: dict[str, float]) -> dict[str, float | list[float] | None]:
        """What a log line shows. weights: of the terms in use, by name. A mean without weight is
        null, not zero."""
        s = {name: value.item() for name, value in self.scalars.items()}

        def mean(name: str, over: str = "weight") -> float | None:
            return s[name] / s[over] if s[over] else None

        terms = {name: mean(f"{name}_sum") for name in weights}
        row = {
            "loss": _weighted(terms, weights),
            **{f"{name}_loss": value for name, value in terms.items()},
            "sampler/anchors_per_sample": mean("blocks", "samples"),
            "sampler/candidates_per_sample": mean("candidates", "samples"),
            "sampler/supervised_slots_per_block": mean("rows", "blocks"),
            "sampler/padding_share": mean("padding", "positions"),
        }
        if "l1" in weights:
            row["tau"] = mean("tau_sum", "blocks")
            row["accept_rate"] = (self.accept_sum / self.accept_count.clamp(min=1)).tolist()
        if "confidence" in weights:
            row["confidence_abs_error"] = mean("confidence_error_sum")
            row["confidence_bias"] = mean("confidence_bias_sum")
        return row


def _weighted(terms: dict[str, float | None], weights: dict[str, float]) -> float | None:
    if any(term is None for term in terms.values()):
        return None
    return sum(weight * terms[name] for name, weight in weights.items())
