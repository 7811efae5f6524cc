"""Draft layers of Transformer Engine's kernels: all that this project knows of it.

Its layers need CUDA to be built, so this module is imported only where they are asked for. They
carry the parameter names, and so the checkpoints, of the local ones.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.extensions.transformer_engine import (
    TELayerNormColumnParallelLinear,
    TELinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from dspark_megatron.model.layers.qwen3 import (
    ContextInjectionAttention,
    ContextInjectionAttentionSubmodules,
    DraftLayer,
    DraftLayerSubmodules,
)


def transformer_engine_layer_spec() -> ModuleSpec:
    """Norm and first MLP product fused; query, key and value norms and products apart, since the
    context's keys and values come from the same weights without that norm."""
    attention = ContextInjectionAttentionSubmodules(
        linear_q=ColumnShard,
        linear_kv=ColumnShard,
        linear_proj=TERowParallelLinear,
        q_layernorm=TENorm,
        k_layernorm=TENorm,
    )
    mlp = MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear)
    layer = DraftLayerSubmodules(
        input_layernorm=TENorm,
        self_attention=ModuleSpec(module=ContextInjectionAttention, submodules=attention),
        pre_mlp_layernorm=NormOfNextLinear,
        mlp=ModuleSpec(module=MLP, submodules=mlp),
    )
    return ModuleSpec(module=FusedNormDraftLayer, submodules=layer)


class ColumnShard(TELinear):
    """This rank's columns of a column-parallel linear and nothing more: `ColumnParallelLinear` with
    `disable_grad_reduce`, which Transformer Engine's own cannot be told. weight [out/tp, in], bias
    [out/tp]."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        tp_group: dist.ProcessGroup,
        init_method: Any,
        bias: bool,
        gather_output: bool,
        skip_bias_add: bool,
        disable_grad_reduce: bool,
    ) -> None:
        assert disable_grad_reduce and not gather_output and not config.sequence_parallel
        super().__init__(
            input_size,
            output_size // tp_group.size(),
            parallel_mode="duplicated",  # to Transformer Engine: no other rank has a part in it
            config=config,
            init_method=init_method,
            bias=bias,
            skip_bias_add=skip_bias_add,
            skip_weight_param_allocation=False,
        )
        self._shards = tp_group
        if bias:
            set_tensor_model_parallel_attributes(self.bias, True, 0, 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        names = [name for name, _ in self.named_parameters()]
        return make_sharded_tensors_for_checkpoint(
            {name: getattr(self, name) for name in names},
            prefix,
            dict.fromkeys(names, 0),
            sharded_offsets,
            tp_group=self._shards,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class NormOfNextLinear(torch.nn.Module):
    """Stands where the local layer has a norm that is part of the next linear here: passes its
    input on, and holds that norm's weight under the local name."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class FusedNormDraftLayer(DraftLayer):
    """The one weight has two names then. Modules list it under the first, the local one;
    `DSparkDraftModel.sharded_state_dict` leaves out the other."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pre_mlp_layernorm.weight = self.mlp.linear_fc1.layer_norm_weight
