"""One decoder layer of the draft: pre-norm attention and SwiGLU with residuals (Qwen3 style)."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor


@dataclass
class DraftLayerSubmodules:
    input_layernorm: Any
    self_attention: Any
    pre_mlp_layernorm: Any
    mlp: Any


class DraftLayer(MegatronModule):
    """Forward: two all-reduces of [n, k, h] (attention, MLP). Backward: the same."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DraftLayerSubmodules,
        *,
        tp_group: dist.ProcessGroup,
        group_size: int,
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        norm = dict(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.input_layernorm = build_module(submodules.input_layernorm, **norm)
        self.self_attention = build_module(
            submodules.self_attention, config=config, tp_group=tp_group, group_size=group_size
        )
        self.pre_mlp_layernorm = build_module(submodules.pre_mlp_layernorm, **norm)
        self.mlp = build_module(
            submodules.mlp,
            config=config,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=tp_group,
        )

    def forward(
        self,
        hidden: Tensor,
        context_kv: tuple[Tensor, Tensor],
        context_ranges: list[tuple[int, int]],
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        """[n, k, h] -> [n, k, h]; the other arguments as in ContextInjectionAttention."""
        normed = self.input_layernorm(hidden)
        hidden = hidden + self.self_attention(normed, context_kv, context_ranges, rope)
        out, _ = self.mlp(self.pre_mlp_layernorm(hidden))
        return hidden + out
