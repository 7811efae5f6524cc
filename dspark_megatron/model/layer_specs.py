"""Which Megatron-Core classes a draft layer is built from."""

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from dspark_megatron.model.attention import (
    ContextInjectionAttention,
    ContextInjectionAttentionSubmodules,
)
from dspark_megatron.model.draft_layer import DraftLayer, DraftLayerSubmodules
from dspark_megatron.model.rms_norm import RMSNorm


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
