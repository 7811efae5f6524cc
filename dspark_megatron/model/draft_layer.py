"""One decoder layer of the draft: pre-norm attention and SwiGLU with residuals (Qwen3 style).

Shapes: as in `attention`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from dspark_megatron.ops.block_attention import BlockAttention


@dataclass
class DraftLayerSubmodules:
    input_layernorm: Any
    self_attention: Any
    pre_mlp_layernorm: Any
    mlp: Any


class DraftLayer(MegatronModule):
    """Forward: two all-reduces of [n*k, h] (attention, MLP). Backward: the same, and those of the
    forward pass again when activations are recomputed: then only the inputs are kept. With sequence
    parallelism an all-gather and a reduce-scatter in place of each all-reduce, and one all-gather
    more in backward: the MLP keeps its input split."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DraftLayerSubmodules,
        *,
        tp_group: dist.ProcessGroup,
        recompute_activations: bool,
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.recompute_activations = recompute_activations
        norm = dict(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.input_layernorm = build_module(submodules.input_layernorm, **norm)
        self.self_attention = build_module(
            submodules.self_attention, config=config, tp_group=tp_group
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
        attend: BlockAttention,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        """[R, h] -> [R, h]; the other arguments as in ContextInjectionAttention."""
        # A checkpoint passes on tensors only; what needs no gradient is bound here.
        run = partial(self._forward, attend, rope)
        if self.recompute_activations and torch.is_grad_enabled():
            return checkpoint(run, False, hidden, *context_kv)
        return run(hidden, *context_kv)

    def _forward(
        self,
        attend: BlockAttention,
        rope: tuple[Tensor, Tensor],
        hidden: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        normed = self.input_layernorm(hidden)
        hidden = hidden + self.self_attention(normed, (key, value), attend, rope)
        out, _ = self.mlp(self.pre_mlp_layernorm(hidden))
        return hidden + out
