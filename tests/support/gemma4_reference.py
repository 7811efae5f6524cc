"""Plain twins of a Gemma-4 draft: one written from the formulas, and one of Transformers' own
classes, as DeepSpec puts them together. All but the layers, norms, embedding and RoPE is
`reference.PlainDraft`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4RMSNorm,
    Gemma4TextMLP,
    Gemma4TextRotaryEmbedding,
    Gemma4TextScaledWordEmbedding,
    apply_rotary_pos_emb,
)

from dspark_megatron.shape import DraftShape
from support.reference import PlainAttention, PlainDraft


class PlainNorm(nn.Module):
    """x / rms(x), times a weight where there is one."""

    def __init__(self, width: int, eps: float, with_weight: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if with_weight else 1.0

    def forward(self, states: Tensor) -> Tensor:
        return states / (states.square().mean(dim=-1, keepdim=True) + self.eps).sqrt() * self.weight


class PlainGemma4Attention(PlainAttention):
    """Raw keys are the values where they are shared; values are normed; scores are not scaled."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__(shape)
        self.shared = shape.shared_key_value
        if self.shared:
            del self.v_proj
        d, eps = shape.head_dim, shape.rms_norm_eps
        self.q_norm, self.k_norm = PlainNorm(d, eps), PlainNorm(d, eps)
        self.v_norm = PlainNorm(d, eps, with_weight=False)

    def forward(
        self, hidden: Tensor, context: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]
    ) -> Tensor:
        both = torch.cat([context, hidden])  # [s + n*k, h]
        query = self.q_norm(self._heads(self.q_proj(hidden)))  # [n*k, a, d]
        raw = self._heads(self.k_proj(both))
        key = self.k_norm(raw)
        value = self.v_norm(raw if self.shared else self._heads(self.v_proj(both)))
        cos, sin = (part[:, None] for part in rope)
        rows = slice(len(context), None)
        query = _rotated(query, cos[rows], sin[rows])
        key = _rotated(key, cos, sin)
        key, value = (x.repeat_interleave(self.share, dim=1) for x in (key, value))
        unscaled = query * math.sqrt(self.head_dim)  # undoes what `attend` divides by
        return self.o_proj(self.attend(unscaled, key, value, mask).flatten(1))


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


class PlainGemma4MLP(nn.Module):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        h, f = shape.hidden_size, shape.ffn_hidden_size
        self.gate_proj, self.up_proj = (nn.Linear(h, f, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(f, h, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate = F.gelu(self.gate_proj(hidden), approximate="tanh")
        return self.down_proj(gate * self.up_proj(hidden))


class PlainGemma4Layer(nn.Module):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.self_attn = PlainGemma4Attention(shape)
        self.mlp = PlainGemma4MLP(shape)
        for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            norm = PlainNorm(shape.hidden_size, shape.rms_norm_eps)
            setattr(self, f"{place}_layernorm", norm)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(
        self, hidden: Tensor, context: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden), context, mask, rope)
        hidden = hidden + self.post_attention_layernorm(attended)
        out = self.mlp(self.pre_feedforward_layernorm(hidden))
        return (hidden + self.post_feedforward_layernorm(out)) * self.layer_scalar


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * math.sqrt(self.embedding_dim)


class PlainGemma4Draft(PlainDraft):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__(shape)
        h, eps = shape.hidden_size, shape.rms_norm_eps
        self.embed_tokens = ScaledEmbedding(shape.vocab_size, h).requires_grad_(False)
        self.hidden_norm, self.norm = PlainNorm(h, eps), PlainNorm(h, eps)
        self.layers = nn.ModuleList(PlainGemma4Layer(shape) for _ in range(shape.num_layers))
        self.rotary = (self._rope,)

    def _rope(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The first pairs of a head turn, by frequencies of the whole head; the others do not."""
        d, rope = self.shape.head_dim, self.shape.rope_parameters
        turned = int(rope["partial_rotary_factor"] * d // 2)
        frequencies = torch.zeros(d // 2)
        frequencies[:turned] = rope["rope_theta"] ** (-2.0 * torch.arange(turned) / d)
        angles = positions[..., None] * frequencies.repeat(2)
        return angles.cos(), angles.sin()


def gemma4_text_config(shape: DraftShape) -> Gemma4TextConfig:
    """What Transformers' own classes need of a shape."""
    return Gemma4TextConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        num_global_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        global_head_dim=shape.head_dim,
        attention_k_eq_v=shape.shared_key_value,
        layer_types=["full_attention"] * shape.num_layers,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"full_attention": dict(shape.rope_parameters)},
        max_position_embeddings=shape.max_position_embeddings,
    )


class _ClassesAttention(PlainGemma4Attention):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__(shape)
        d, eps = shape.head_dim, shape.rms_norm_eps
        self.q_norm, self.k_norm = Gemma4RMSNorm(d, eps), Gemma4RMSNorm(d, eps)
        self.v_norm = Gemma4RMSNorm(d, eps, with_scale=False)

    def forward(
        self, hidden: Tensor, context: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]
    ) -> Tensor:
        cos, sin = rope
        both = torch.cat([context, hidden])
        query = self.q_norm(self._heads(self.q_proj(hidden)))
        raw = self._heads(self.k_proj(both))
        value = self.v_norm(raw if self.shared else self._heads(self.v_proj(both)))
        rows = slice(len(context), None)
        query = apply_rotary_pos_emb(query, cos[rows], sin[rows])
        key = apply_rotary_pos_emb(self.k_norm(raw), cos, sin)
        parts = [x.transpose(0, 1)[None] for x in (query, key, value)]
        out = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=1.0, enable_gqa=True)
        return self.o_proj(out[0].transpose(0, 1).flatten(1))


class Gemma4ClassesDraft(PlainGemma4Draft):
    """Of Transformers' norms, MLP, embedding and RoPE."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__(shape)
        config, h, eps = gemma4_text_config(shape), shape.hidden_size, shape.rms_norm_eps
        scale = h**0.5
        self.embed_tokens = Gemma4TextScaledWordEmbedding(shape.vocab_size, h, None, scale)
        self.hidden_norm, self.norm = Gemma4RMSNorm(h, eps), Gemma4RMSNorm(h, eps)
        for i, layer in enumerate(self.layers):
            layer.self_attn, layer.mlp = _ClassesAttention(shape), Gemma4TextMLP(config, i)
            for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
                setattr(layer, f"{place}_layernorm", Gemma4RMSNorm(h, eps))
        rotary = Gemma4TextRotaryEmbedding(config)
        self.rotary = (lambda like, positions: rotary(like, positions, "full_attention"),)
