"""What a draft is, whatever layout it lies in: its shape and the few facts of its training that
some layout's config wants."""

from dataclasses import dataclass
from typing import Any

from dspark_megatron.config import LossConfig, ModelConfig
from dspark_megatron.shape import DraftShape


@dataclass(frozen=True, kw_only=True)
class DraftDescription:
    shape: DraftShape
    num_anchors: int = ModelConfig.num_anchors
    initializer_range: float = ModelConfig.initializer_range
    confidence_head_alpha: float = LossConfig.confidence_head_alpha

    @classmethod
    def of_checkpoint(cls, meta: dict[str, Any]) -> "DraftDescription":
        """From a training checkpoint's `dspark.json`."""
        return cls(
            shape=DraftShape.from_dict(meta["shape"]),
            num_anchors=meta["num_anchors"],
            initializer_range=meta["initializer_range"],
            confidence_head_alpha=meta["confidence_head_alpha"],
        )

    def facts(self) -> dict[str, Any]:
        """All but the shape."""
        return {
            "num_anchors": self.num_anchors,
            "initializer_range": self.initializer_range,
            "confidence_head_alpha": self.confidence_head_alpha,
        }
