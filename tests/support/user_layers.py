"""Draft layers as a user would hand them in by `model.layer_spec`: good ones and bad ones."""

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from dspark_megatron.mcore.rms_norm import RMSNorm
from dspark_megatron.model.layer_specs import layer_spec


class MyNorm(RMSNorm):
    """Changes nothing."""

    times = 0

    def forward(self, hidden):
        type(self).times += 1
        return super().forward(hidden)


class MyMLP(MLP):
    """Changes nothing."""

    times = 0

    def forward(self, *arguments, **options):
        type(self).times += 1
        return super().forward(*arguments, **options)


class GatedMLP(MLP):
    """Has a parameter that a draft has no place for."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gate = torch.nn.Parameter(torch.zeros(1))


class UnsplitLinear(torch.nn.Linear):
    """Built for one rank's columns, and not marked as a part of a whole."""

    def __init__(self, input_size, output_size, *, config, tp_group, **rest):
        super().__init__(input_size // tp_group.size(), output_size, bias=False)


class NoNorm(torch.nn.Identity):
    """Has no weight."""


def with_mlp(module):
    spec = layer_spec("local")
    spec.submodules.mlp.module = module
    return spec


def same():
    spec = with_mlp(MyMLP)
    spec.submodules.input_layernorm = MyNorm
    return spec


def gated():
    return with_mlp(GatedMLP)


def no_norm():
    spec = layer_spec("local")
    spec.submodules.input_layernorm = NoNorm
    return spec


def unsplit():
    spec = layer_spec("local")
    spec.submodules.self_attention.submodules.linear_proj = UnsplitLinear
    return spec


def fails():
    raise RuntimeError("on purpose")


SAME = same()
GPT_LAYER = ModuleSpec(module=TransformerLayer)
LINEAR = RowParallelLinear
