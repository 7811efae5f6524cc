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

from dspark_megatron.planning.on_paper.ranks import one_of_ranks
from dspark_megatron.planning.target.few_layers import keep_layers
from dspark_megatron.planning.target.on_meta import sharding_on_meta
from dspark_megatron.targets.huggingface.quantization import quantization_method, quantizer_of
from dspark_megatron.targets.huggingface.quiet import quiet_transformers
from dspark_megatron.targets.huggingface.split import TargetSplit, meta_target, style_of
from dspark_megatron.targets.huggingface.target import decoder_layers


@contextlib.contextmanager
def rank_model(
    target_config: PretrainedConfig,
    dtype: torch.dtype,
    split: TargetSplit,
    *,
    layers: tuple[int, ...],
    attention: str | None = None,
    quantized: bool = False,
) -> Iterator[PreTrainedModel]:
    """That of the first rank, with the process groups of one copy of the target, inside the `with`.
    layers: those that it has. attention: its implementation. quantized: with the weights of its
    quantizer, which then does not run."""
    whole, kept = meta_target(target_config, dtype), set(layers)
    # Layers that are not kept need not be copied, which takes longer than all the rest.
    dropped = (layer for i, layer in enumerate(decoder_layers(whole)) if i not in kept)
    model = copy.deepcopy(whole, {id(layer): nn.Identity() for layer in dropped})
    keep_layers(model, layers)
    if quantized:
        quantizer_of(target_config).preprocess_model(model=model, dtype=dtype)
    if attention is not None:
        model.set_attn_implementation(attention)
    with one_of_ranks(split.tp_size * split.shards), sharding_on_meta():
        distributed = replace(split, dp_size=split.shards).distributed_config()
        if distributed is not None:
            # Of layers that are not kept it says that the plan's rules match nothing.
            with quiet_transformers():
                given, _, mesh = type(model).prepare_distribute_model(distributed)
                model = type(model).maybe_distribute_model(model, given, mesh)
        yield model.eval().requires_grad_(False)


def local(tensor: Tensor) -> Tensor:
    """What the rank holds of a parameter or buffer."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def target_bytes(
    target_config: PretrainedConfig,
    dtype: torch.dtype,
    split: TargetSplit,
    *,
    last_layer: int | None = None,
    dequantized: bool = False,
) -> int | None:
    """Bytes of the base model's weights on the rank that holds most.

    What no sharded module gives back after its use (the final norm, a vision tower) is gathered in
    the first forward pass and stays, beside the part that the rank holds anyway. last_layer: the
    highest decoder layer that is kept, None for all. dequantized: count a quantized target as if it
    were not; else it is counted as it is saved, and None where that is not known."""
    method = quantization_method(target_config)
    quantized = method is not None and not dequantized
    if quantized and method != "fp8":
        return None  # the layers of other methods depend on packages and the machine
    depth = len(decoder_layers(meta_target(target_config, dtype)))
    kept = depth if last_layer is None else last_layer + 1
    layers = tuple(range(kept))
    with rank_model(target_config, dtype, split, layers=layers, quantized=quantized) as model:
        total = 0
        for name, parameter in model.named_parameters():
            held = local(parameter)
            total += held.nbytes
            if split.shards > 1 and not _is_given_back(name, model):
                total += min(held.nbytes * split.shards, parameter.nbytes)
        return total


def _is_given_back(name: str, model: PreTrainedModel) -> bool:
    """Whether a module around the parameter frees its whole weights after each use."""
    modules = [name[:i] for i, letter in enumerate(name) if letter == "."]
    return any(style_of(module, model.fsdp_plan) == "free_full_weight" for module in modules)
