"""Which classes a draft layer is built from: Megatron-Core's own, or Transformer Engine's."""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from dspark_megatron import transformer_engine
from dspark_megatron.config import require
from dspark_megatron.model.attention import (
    ContextInjectionAttention,
    ContextInjectionAttentionSubmodules,
)
from dspark_megatron.model.draft_layer import DraftLayer, DraftLayerSubmodules
from dspark_megatron.rms_norm import RMSNorm


def layer_spec(backend: str) -> ModuleSpec:
    """The draft layer of `model.backend`. Raises ConfigError where Transformer Engine is asked for
    by name and cannot run."""
    if backend == "local":
        return local_layer_spec()
    usable = transformer_engine.is_usable()
    found = f"{torch.cuda.is_available()} and {transformer_engine.is_installed()}"
    require(
        usable or backend == "auto",
        "model.backend 'transformer_engine' needs a GPU and the package transformer-engine (found: "
        f"{found}); install both or set "
        "model.backend=local: a checkpoint moves between the two",
    )
    if not usable:
        return local_layer_spec()
    from dspark_megatron.model.transformer_engine_spec import transformer_engine_layer_spec

    return transformer_engine_layer_spec()


def local_layer_spec() -> ModuleSpec:
    """Megatron-Core's own parallel linears and PyTorch's RMSNorm: runs on any device."""
    attention = ContextInjectionAttentionSubmodules(
        linear_q=ColumnParallelLinear,
        linear_kv=ColumnParallelLinear,
        linear_proj=RowParallelLinear,
        q_layernorm=RMSNorm,
        k_layernorm=RMSNorm,
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layer = DraftLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(module=ContextInjectionAttention, submodules=attention),
        pre_mlp_layernorm=RMSNorm,
        mlp=ModuleSpec(module=MLP, submodules=mlp),
    )
    return ModuleSpec(module=DraftLayer, submodules=layer)
