"""What a slot loses: a weighted sum of terms, all but CE made of distances to the target."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_megatron.config import LossConfig
from dspark_megatron.config.objective.terms import LossTerms
from dspark_megatron.ops.objective.distances import COMPOSED, DISTANCES


@dataclass(kw_only=True, frozen=True)
class Objective(LossTerms):
    """Weights of a slot's terms, and what their labels are."""

    labels_from_target: bool = False
    """CE with the target's most likely token instead of the given labels."""

    @classmethod
    def of(cls, loss: LossConfig) -> "Objective":
        return cls(**loss.terms.by_name, labels_from_target=loss.ce_labels == "target_argmax")

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms that are computed, in their order: CE and L1, then all others that weigh
        anything."""
        return {name: x for name, x in self.by_name.items() if x > 0 or name in ("ce", "l1")}

    @property
    def needs_target_logits(self) -> bool:
        return self.compare_with_target or self.labels_from_target

    @property
    def distances(self) -> tuple[str, ...]:
        """Those of the second pass, in the order in which they are taken: L1 comes last, since it
        may overwrite q, and always, since metrics show the accept rate."""
        parts = [name for term in self.weights for name in COMPOSED.get(term, (None, (term,)))[1]]
        return *(name for name in DISTANCES if name in parts and name != "l1"), "l1"

    @property
    def needs_log_ratio(self) -> bool:
        return any(DISTANCES[name].needs_log_ratio for name in self.distances)

    @property
    def keeps_q(self) -> bool:
        """Whether a distance pulls to q itself."""
        return any(DISTANCES[name].is_pull for name in self.distances)

    @property
    def num_sums(self) -> int:
        """Floats of a slot that the second pass adds over all shards."""
        return sum(DISTANCES[name].num_sums for name in self.distances)

    def by_distance(self, sums: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums of the second pass [num_sums, c] -> the distance and sum p f, each [c]."""
        counts = [DISTANCES[name].num_sums for name in self.distances]
        parts = zip(self.distances, sums.split(counts), strict=True)
        return {name: (part[0], part[-1]) for name, part in parts}

    def terms(self, ce: Tensor, distances: dict[str, Tensor]) -> Tensor:
        """[terms, c] in the order of `weights`, from CE and the distances [c]."""
        known = {"ce": ce, **distances}
        return torch.stack(
            [COMPOSED[x][0](known)[0] if x in COMPOSED else known[x] for x in self.weights]
        )

    def slopes(self, distances: dict[str, Tensor]) -> dict[str, Tensor | float]:
        """What the gradient of each distance weighs in that of a slot's loss; [c] where a composed
        term has a factor for each slot."""
        weights = self.by_name  # the overlap is no term by itself
        slopes: dict[str, Tensor | float] = {x: weights.get(x, 0.0) for x in self.distances}
        for term, (function, _) in COMPOSED.items():
            if (weight := getattr(self, term)) > 0:
                for name, slope in function(distances)[1].items():
                    slopes[name] = slopes[name] + weight * slope
        return slopes

    def of_slot(self, terms: Tensor) -> Tensor:
        """[terms, n] in the order of `weights` -> the loss of each slot, [n]."""
        parts = [x * term for x, term in zip(self.weights.values(), terms, strict=True)]
        return torch.stack(parts).sum(dim=0)
