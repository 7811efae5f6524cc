"""Initial weights as a pure function of (seed, parameter name), whatever the layout."""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from dspark_megatron.ops.seeds import derived_seed
from dspark_megatron.ops.vocab_parallel import VocabShard


@torch.no_grad()
def init_parameters(
    model: MegatronModule, *, seed: int, std: float, tp_rank: int, tp_size: int, shard: VocabShard
) -> None:
    """Fill every trained parameter: norms one, biases zero, the rest normal(0, std).

    Each rank draws the whole tensor from the name's own seed and keeps its part, so the weights
    are the same at every tensor-parallel size. Vocabulary padding is zero. Costs one full tensor
    of fp32 at a time on the CPU.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            vocab = shard if ".markov_w" in name else None
            parameter.copy_(_draw(name, parameter, seed, std, tp_rank, tp_size, vocab))


def _draw(
    name: str,
    parameter: Any,
    seed: int,
    std: float,
    tp_rank: int,
    tp_size: int,
    vocab: VocabShard | None,
) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed("weights", seed, name))
    shape = list(parameter.shape)
    if vocab is not None:
        full = torch.randn(vocab.vocab_size, shape[1], generator=generator) * std
        local = torch.zeros(shape)
        rows = full[vocab.vocab_start_index : vocab.vocab_end_index]
        local[: rows.shape[0]] = rows
        return local
    if not getattr(parameter, "tensor_model_parallel", False):
        return torch.randn(shape, generator=generator) * std
    dim: int = getattr(parameter, "partition_dim")  # noqa: B009
    shape[dim] *= tp_size
    full = torch.randn(shape, generator=generator) * std
    # A stride of 2 means two matrices side by side (gate and up), each split on its own.
    stride: int = getattr(parameter, "partition_stride")  # noqa: B009
    parts = full.chunk(stride, dim=dim)
    return torch.cat([part.chunk(tp_size, dim=dim)[tp_rank] for part in parts], dim=dim)
