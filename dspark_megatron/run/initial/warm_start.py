"""A draft that starts as layers of its target: `model.initialize_from_target_layers`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dspark_megatron.errors import require
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.initial.checkpoint_layers import CheckpointLayers
from dspark_megatron.run.initial.target_layers import (
    FAMILIES,
    FolderLayers,
    LayerCopies,
    LayerSource,
    copy_layers,
    layer_copies,
)
from dspark_megatron.shape import draft_shape, gemma4
from dspark_megatron.storage.gpt_checkpoint import GPTCheckpoint
from dspark_megatron.targets.huggingface.quantization import quantization_method


@dataclass(frozen=True)
class WarmStart:
    """Layers of the target that the run's draft can take over."""

    ids: tuple[int, ...]
    source: LayerSource
    copies: LayerCopies

    @classmethod
    def open(cls, plan: RunPlan) -> "WarmStart | None":
        """Those of the config, or None where it names none. Reads names and shapes. Raises
        ConfigError as `check_warm_start` does, and when no matrix fits."""
        check_warm_start(plan)
        ids = plan.config.model.initialize_from_target_layers
        if not ids:
            return None
        source = layer_source(plan)
        own = _has_targets_heads(plan)
        same_heads = [own and _has_drafts_heads(plan, i) for i in ids]
        copies = layer_copies(source, ids, plan.shape, same_heads=same_heads)
        require(
            any(row.split is not None for row in copies.rows),
            f"model.initialize_from_target_layers {ids}: no matrix of these layers fits the draft; "
            "set it to [], or set model.ffn_hidden_size and the draft's heads to the target's:\n"
            + "\n".join(copies.report),
        )
        return cls(tuple(ids), source, copies)

    def load(self, draft: DSparkDraftModel, *, tp_group: dist.ProcessGroup) -> None:
        """Fill what is copied; the rest of the draft stays as it is. Each rank reads for itself."""
        copy_layers(draft, self.copies.rows, self.source, tp_group=tp_group)

    def describe(self) -> str:
        first = f"draft layers start as the target's layers {list(self.ids)}"
        return "\n".join([first, *self.copies.report])


def layer_source(plan: RunPlan) -> LayerSource:
    """Where the weights of the target's layers are: the one place that knows. ConfigError where
    they are nowhere."""
    target = plan.config.target
    if target.checkpoint:
        text = plan.target_config.get_text_config()
        return CheckpointLayers(GPTCheckpoint(target.checkpoint), text)
    path = Path(target.path)
    require(
        any(path.glob("*.safetensors*")),
        "model.initialize_from_target_layers copies from the safetensors of target.path, and "
        f"{path} has none; put the target's weights there, name a Megatron-LM checkpoint in "
        "target.checkpoint, or set it to []",
    )
    return FolderLayers(path)


def check_warm_start(plan: RunPlan) -> None:
    """ConfigError unless the target's config allows the layers that the draft is to start from;
    needs no weights."""
    ids = plan.config.model.initialize_from_target_layers
    text = plan.target_config.get_text_config()
    if not ids:
        return
    name, last = "model.initialize_from_target_layers", text.num_hidden_layers - 1
    require(
        len(ids) == plan.shape.num_layers,
        f"{name} {ids} has {len(ids)} layers and the draft {plan.shape.num_layers}; name one of "
        "the target's for each draft layer, or set it to []",
    )
    require(
        all(0 <= i <= last for i in ids),
        f"{name} {ids} must lie in [0, {last}]: the target has {last + 1} layers (0-based)",
    )
    gemma = plan.shape.architecture == "gemma4"
    families = gemma4.FAMILIES if gemma else FAMILIES
    require(
        text.model_type in families,
        f"{name}: layers of {text.model_type!r} are not built as the draft's are; set it to []. "
        f"Families that are: {', '.join(families)}",
    )
    activation = getattr(text, "hidden_act", "silu")
    require(
        gemma or activation == "silu",
        f"{name}: the target's MLP has the activation {activation!r}, and the draft's has 'silu'; "
        "set it to []",
    )
    method = quantization_method(plan.target_config)
    require(
        method is None,
        f"{name}: the target is quantized ({method}), and the draft's weights are not; set it to "
        "[], or save the target dequantized and set target.path to that folder",
    )


def _has_drafts_heads(plan: RunPlan, layer: int) -> bool:
    """False for layers of a Gemma-4 target that slide: their heads are others."""
    text = plan.target_config.get_text_config()
    return plan.shape.architecture != "gemma4" or text.layer_types[layer] == "full_attention"


def _has_targets_heads(plan: RunPlan) -> bool:
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    own_heads: dict[str, Any] = dict.fromkeys(names)
    model = replace(plan.config.model, **own_heads)
    own = draft_shape(model, plan.target_config)
    return all(getattr(plan.shape, name) == getattr(own, name) for name in names)
