"""Memory of the frozen target on one rank, from its config alone."""

import copy
import math

import torch
from transformers import PretrainedConfig

from dspark_megatron.targets.huggingface.quantization import quantization_method, quantizer_of
from dspark_megatron.targets.huggingface.split import (
    TargetSplit,
    meta_target,
    split_dimension,
    style_of,
)


def target_bytes(
    target_config: PretrainedConfig,
    dtype: torch.dtype,
    split: TargetSplit,
    *,
    last_layer: int | None = None,
    dequantized: bool = False,
) -> int | None:
    """Bytes of the base model's weights on one rank, the largest part of each.

    Transformers' own plans of the family say what tensor and expert parallelism split; sharding
    splits what is left on the first dimension. What no plan gives back after its use (the final
    norm, a vision tower) is gathered in the first forward pass and stays, so it counts whole.
    last_layer: the highest decoder layer that is kept, None for all. dequantized: count a quantized
    target as if it were not; else it is counted as it is saved, and None where that is not known.
    """
    model = meta_target(target_config, dtype)
    if quantization_method(target_config) is not None and not dequantized:
        if quantization_method(target_config) != "fp8":
            return None  # the layers of other methods depend on packages and the machine
        model = copy.deepcopy(model)
        quantizer_of(target_config).preprocess_model(model=model, dtype=dtype)
    total = 0
    for name, parameter in model.named_parameters():
        if last_layer is not None and _layer_of(name) > last_layer:
            continue
        size = list(parameter.shape)
        shards = split.shards if _is_given_back(name, model.fsdp_plan) else 1
        if split.ep_size > 1 and style_of(name, model.ep_plan):
            size[0], shards = size[0] // split.ep_size, split.expert_shards
        else:
            dimension = split_dimension(style_of(name, model.tp_plan), parameter)
            if dimension is not None:
                size[dimension] = math.ceil(size[dimension] / split.tp_size)
        size[0] = math.ceil(size[0] / shards)
        total += math.prod(size) * parameter.dtype.itemsize
    return total


def _is_given_back(name: str, plan: dict[str, str]) -> bool:
    """Whether a module around the parameter frees its whole weights after each use."""
    modules = [name[:i] for i, letter in enumerate(name) if letter == "."]
    return any(style_of(module, plan) == "free_full_weight" for module in modules)


def _layer_of(name: str) -> int:
    """Number of the decoder layer that a parameter belongs to; -1 for none."""
    _, _, rest = name.partition("layers.")
    number = rest.partition(".")[0]
    return int(number) if number.isdigit() else -1
