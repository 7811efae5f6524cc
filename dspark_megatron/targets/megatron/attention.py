"""Causal attention of the frozen target, by PyTorch's own kernels."""

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class CausalAttention(MegatronModule):
    """In place of Megatron-Core's `DotProductAttention`, which keeps all [s, s] scores."""

    def __init__(self, config: Any, *, softmax_scale: float | None = None, **_: Any) -> None:
        """config: a TransformerConfig. The rest of what specs pass does not matter here."""
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query [s, b, heads/tp, d], key and value [s, b, groups/tp, d] -> [s, b, heads/tp * d]"""
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return attended.permute(2, 0, 1, 3).flatten(2)
