"""Whether a draft can work at all, and with a given target."""

import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.conversion.layouts.names import EMBEDDING, LM_HEAD, raise_if_any
from dspark_megatron.shape import DraftShape
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.storage.target_weights import shared_matrices

_logger = logging.getLogger(__name__)


def open_draft_folder(
    path: str | Path,
    target_dir: str | Path,
    layout: str = "auto",
    *,
    target_checkpoint: str | Path = "",
    rope: dict[str, Any] | None = None,
    allow_unknown: Collection[str] = (),
) -> DraftFolder:
    """A draft folder that belongs to this target; ConfigError that lists what speaks against it.
    rope, allow_unknown: as DraftFolder has them. What may be otherwise than its config says is
    logged."""
    target_config = load_target_config(target_dir)
    facts = TargetFacts.of(target_config, Path(target_dir).resolve().name)
    folder = DraftFolder(path, layout, facts, rope=rope, allow_unknown=allow_unknown)
    for line in folder.doubts:
        _logger.warning(line)
    problems = shape_problems(folder.shape) + target_problems(folder.shape, target_config)
    raise_if_any(problems, f"the draft in {folder.path}")
    raise_if_any(shared_problems(folder, target_dir, target_checkpoint), str(folder.path))
    return folder


def shape_problems(shape: DraftShape) -> list[str]:
    """What makes a draft unusable with every engine."""
    ids, last = list(shape.target_layer_ids), shape.num_target_layers - 2
    problems = []
    if not ids or sorted(set(ids)) != ids or ids[0] < 0 or ids[-1] > last:
        problems.append(
            f"target_layer_ids {ids} must be strictly increasing and in [0, {last}]: engines "
            "sort them and cannot capture the output of the last layer"
        )
    if not 0 <= shape.mask_token_id < shape.vocab_size:
        problems.append(f"mask_token_id ({shape.mask_token_id}) must be in [0, {shape.vocab_size})")
    return problems


def target_problems(shape: DraftShape, target_config: Any) -> list[str]:
    """What makes a draft unusable with this target."""
    text = target_config.get_text_config()
    pairs = {
        "vocab_size": (shape.vocab_size, text.vocab_size),
        "hidden_size": (shape.hidden_size, text.hidden_size),
        "num_target_layers": (shape.num_target_layers, text.num_hidden_layers),
    }
    return [
        f"{name} ({ours}) must be the target's ({theirs}); give the target it was trained for"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]


def shared_problems(
    folder: DraftFolder, target_dir: str | Path, target_checkpoint: str | Path = ""
) -> list[str]:
    """Where the folder's own embedding or LM head is not the target's: this project, like SGLang,
    always takes the target's, so such a draft would change. target_checkpoint: a Megatron-LM
    checkpoint with the target's weights, where the folder has none."""
    lines = (
        difference(name, folder.tensor(name), theirs)
        for name, theirs in targets_shared(folder, target_dir, target_checkpoint)
    )
    return [line for found in lines for line in found]


def targets_shared(
    folder: DraftFolder, target_dir: str | Path, target_checkpoint: str | Path = ""
) -> Iterator[tuple[str, Tensor]]:
    """The target's embedding and LM head, those of them that the folder holds too."""
    matrices = shared_matrices(target_dir, target_checkpoint)
    found = dict(zip((EMBEDDING, LM_HEAD), matrices, strict=True))
    return ((name, found[name].tensor()) for name in folder.shared)


def difference(name: str, found: Tensor, source: Tensor) -> list[str]:
    """A line if two tensors are not the same, bit by bit; source is cast to the type of found."""
    if found.shape == source.shape and torch.equal(found, source.to(found.dtype)):
        return []
    return [f"{name} differs from its source"]


def not_finite(name: str, tensor: Tensor) -> list[str]:
    """A line if some of its values are infinite or no numbers."""
    bad = int((~tensor.isfinite()).sum())
    return [f"{name} has {bad} values that are not finite"] if bad else []
