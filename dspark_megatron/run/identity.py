"""What `dspark.json` says of a run: what its checkpoints share, and what an export says of it."""

from dataclasses import asdict
from typing import Any

from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.template_day import template_day

_NO_MATHEMATICS = ("preset", "chunk_rows", "memory_budget_mb", "compile")
"""Keys of the loss section that a run may change on its way. What a preset stands for is written
out in the other keys."""


def run_identity(plan: RunPlan) -> dict[str, Any]:
    """What a checkpoint must share with a run that continues it, the data aside."""
    loss, day = asdict(plan.config.loss), template_day(plan)
    return {
        **draft_identity(plan),
        **({"template_date": day} if day else {}),
        "seed": plan.config.train.seed,
        "num_anchors": plan.config.model.num_anchors,
        "loss": {name: value for name, value in loss.items() if name not in _NO_MATHEMATICS},
    }


def export_settings(plan: RunPlan) -> dict[str, Any]:
    """What an export says of the training, beside the shape."""
    return {
        "initializer_range": plan.config.model.initializer_range,
        "confidence_head_alpha": plan.config.loss.confidence_head_alpha,
    }


def draft_identity(plan: RunPlan) -> dict[str, Any]:
    """What a checkpoint must share with every use of it."""
    return {
        "shape": plan.shape.to_dict(),
        "target_fingerprint": plan.target_fingerprint,
    }
