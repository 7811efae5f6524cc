"""A target of Transformers as one rank holds it, on the meta device: split by Transformers' own
functions over ranks that exist on paper only."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from dspark_megatron.planning.meta_draft import one_of_ranks
from dspark_megatron.planning.target.few_layers import keep_layers
from dspark_megatron.planning.target.on_meta import sharding_on_meta
from dspark_megatron.targets.huggingface.quantization import quantizer_of
from dspark_megatron.targets.huggingface.split import TargetSplit, meta_target


@contextlib.contextmanager
def rank_model(
    target_config: PretrainedConfig,
    dtype: torch.dtype,
    split: TargetSplit,
    *,
    layers: tuple[int, ...],
    attention: str = "sdpa",
    quantized: bool = False,
) -> Iterator[PreTrainedModel]:
    """That of the first rank, with the process groups of one copy of the target, inside the `with`.
    layers: those that it has. quantized: with the weights of its quantizer, which then does not run."""
    model = copy.deepcopy(meta_target(target_config, dtype))
    keep_layers(model, layers)
    if quantized:
        quantizer_of(target_config).preprocess_model(model=model, dtype=dtype)
    model.set_attn_implementation(attention)
    with one_of_ranks(split.tp_size * split.shards), sharding_on_meta():
        distributed = replace(split, dp_size=split.shards).distributed_config()
        if distributed is not None:
            given, _, mesh = type(model).prepare_distribute_model(distributed)
            model = type(model).maybe_distribute_model(model, given, mesh)
        yield model.eval().requires_grad_(False)


def local_tensors(model: nn.Module) -> list[Tensor]:
    """What the rank holds of each parameter and buffer."""
    tensors = (*model.parameters(), *model.buffers())
    return [x.to_local() if isinstance(x, DTensor) else x.detach() for x in tensors]
