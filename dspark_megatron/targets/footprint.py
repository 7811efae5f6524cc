"""What the frozen target's weights take on a rank, from its config alone."""

import fnmatch
import math

import torch
from transformers import AutoModel, PretrainedConfig


def target_bytes(
    target_config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    tp_size: int,
    shards: int,
    last_layer: int | None = None,
) -> int:
    """Bytes of the base model's weights on one rank, the largest part of each.

    Transformers' own plan of the family says what tensor parallelism splits; sharding splits what
    is left on the first dimension. last_layer: the highest decoder layer that is kept, None for
    all. The model is built on the meta device: it takes no memory.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(target_config, dtype=dtype)
    plan = model.tp_plan or {}
    total = 0
    for name, parameter in model.named_parameters():
        if last_layer is not None and _layer_of(name) > last_layer:
            continue
        size, split = list(parameter.shape), _split_of(name, plan)
        if split:
            size[_dimension(split, len(size))] /= tp_size
        size[0] = math.ceil(math.ceil(size[0]) / shards)
        total += math.prod(math.ceil(x) for x in size) * parameter.dtype.itemsize
    return total


def _split_of(name: str, plan: dict[str, str]) -> str:
    """How the plan splits a parameter, by its own name or its module's; "" if it does not."""
    for candidate in (name, name.rpartition(".")[0]):
        for pattern, style in plan.items():
            if fnmatch.fnmatchcase(candidate, pattern):
                return style if style.endswith(("colwise", "rowwise")) else ""
    return ""


def _dimension(style: str, dimensions: int) -> int:
    """Which dimension a style splits. Experts are stacked on one more, in front."""
    if style == "embedding_rowwise" or dimensions == 1:
        return 0
    return dimensions - 1 if style.endswith("rowwise") else dimensions - 2


def _layer_of(name: str) -> int:
    """Number of the decoder layer that a parameter belongs to; -1 for none."""
    _, _, rest = name.partition("layers.")
    number = rest.partition(".")[0]
    return int(number) if number.isdigit() else -1
