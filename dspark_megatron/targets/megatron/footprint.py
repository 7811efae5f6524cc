"""Memory of a frozen GPTModel on one rank, from its shape alone."""

import math
import re

import torch

from dspark_megatron.shape.layout import stage_layers
from dspark_megatron.targets.megatron.gpt_shape import GPTShape
from dspark_megatron.targets.megatron.hf_weights import EMBEDDING, HEAD, hf_tensors


def gpt_bytes(
    shape: GPTShape,
    dtype: torch.dtype,
    *,
    tp_size: int,
    ep_size: int,
    stages: int,
    last_layer: int | None,
) -> int:
    """Bytes of the weights, the output layer left out: a run frees it when it has compared it. Of
    pipeline stages it is the one that holds most. last_layer: the highest decoder layer that is
    kept, None for all."""
    layers, held = stage_layers(shape.num_layers, stages)[0], [0] * stages
    for name, size in hf_tensors(shape).items():
        layer = re.search(r"layers\.(\d+)\.", name)
        is_cut = last_layer is not None and layer is not None and int(layer[1]) > last_layer
        if name != HEAD and not is_cut:
            outside = 0 if name == EMBEDDING else -1
            stage = outside if layer is None else int(layer[1]) // layers
            held[stage] += _local_elements(name, size, tp_size, ep_size)
    return max(held) * dtype.itemsize


def _local_elements(name: str, size: tuple[int, ...], tp_size: int, ep_size: int) -> int:
    """Of one tensor; the parts of split ones together, as if each rank had the same."""
    if ".experts." in name:
        return math.prod(size) // (ep_size if ep_size > 1 else tp_size)
    if name.endswith(("norm.weight", ".mlp.gate.weight")):
        return math.prod(size)
    return math.ceil(size[0] / tp_size) * math.prod(size[1:])
