"""One decoder layer of a Gemma-4 draft: the attention and MLP of the draft's usual layer between
four norms, with values that are normed as well.

Shapes: as in `qwen3.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from dspark_megatron.model.layers.qwen3 import (
    ContextInjectionAttention,
    DraftLayer,
    DraftLayerSubmodules,
)
from dspark_megatron.ops.attention.block_attention import BlockAttention
from dspark_megatron.ops.rope import apply_rope


class Gemma4Attention(ContextInjectionAttention):
    """Values are divided by their root mean square, head by head, and have no weight for it."""

    def key_value(self, states: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        key, value = self.projected_key_value(states)
        value = F.rms_norm(value, (self.head_dim,), eps=self.config.layernorm_epsilon)
        return apply_rope(self.k_layernorm(key), *rope), value


class LayerScalar(torch.nn.Module):
    """A number that a layer's output is multiplied by: 1, or what a draft came with. Never
    trained, in every checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.value


@dataclass
class Gemma4DraftLayerSubmodules(DraftLayerSubmodules):
    post_self_attn_layernorm: Any
    post_mlp_layernorm: Any


class Gemma4DraftLayer(DraftLayer):
    """Collectives: those of `DraftLayer`."""

    def __init__(self, config: Any, submodules: Gemma4DraftLayerSubmodules, **rest: Any) -> None:
        super().__init__(config, submodules, **rest)
        norm = dict(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.post_self_attn_layernorm = build_module(submodules.post_self_attn_layernorm, **norm)
        self.post_mlp_layernorm = build_module(submodules.post_mlp_layernorm, **norm)
        self.layer_scalar = LayerScalar()

    def _forward(
        self,
        attend: BlockAttention,
        rope: tuple[Tensor, Tensor],
        hidden: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        normed = self.input_layernorm(hidden)
        out = self.self_attention(normed, (key, value), attend, rope)
        hidden = hidden + self.post_self_attn_layernorm(out)
        out, _ = self.mlp(self.pre_mlp_layernorm(hidden))
        return self.layer_scalar(hidden + self.post_mlp_layernorm(out))
