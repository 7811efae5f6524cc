"""The draft's rotary position embedding, in fp32, as the exported draft will compute it.

Shapes: d width of a head, w <= d the widths that are turned.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding


class RotaryTable:
    """cos and sin for any positions.

    Transformers' own classes make the frequencies, since every engine that loads the export does
    the same. The frequencies are a plain fp32 attribute, not a module buffer: a bf16 cast of
    the draft must not round them.
    """

    def __init__(
        self, rope_parameters: dict[str, Any], head_dim: int, max_position_embeddings: int
    ) -> None:
        sizes = dict(head_dim=head_dim, max_position_embeddings=max_position_embeddings)
        of_gemma = rope_parameters["rope_type"] == "proportional"
        frequencies = _gemma4_frequencies if of_gemma else _qwen3_frequencies
        inv_freq, scaling = frequencies(dict(rope_parameters), **sizes)
        self.inv_freq: Tensor = inv_freq.float()  # [w/2]
        self.attention_scaling: float = scaling

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[...] int64 positions -> cos and sin [..., w], computed in fp32, cast once."""
        self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[..., None].float() * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return (cos * self.attention_scaling).to(dtype), (sin * self.attention_scaling).to(dtype)


def _qwen3_frequencies(rope_parameters: dict[str, Any], **sizes: int) -> tuple[Tensor, float]:
    """[w/2], and the scale of cos and sin."""
    # Frequencies of a part of a head are those of a whole head as wide as the part.
    width = int(sizes.pop("head_dim") * rope_parameters.pop("partial_rotary_factor", 1))
    config = Qwen3Config(
        hidden_size=width,
        num_attention_heads=1,
        head_dim=width,
        rope_parameters=rope_parameters,
        **sizes,
    )
    rotary = Qwen3RotaryEmbedding(config)
    return rotary.inv_freq, rotary.attention_scaling


def _gemma4_frequencies(rope_parameters: dict[str, Any], **sizes: int) -> tuple[Tensor, float]:
    """Those of a full-attention layer of Transformers' Gemma 4: no other class has the proportional
    kind, and few drafts need this one."""
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

    kind = "full_attention"
    config = Gemma4TextConfig(
        num_hidden_layers=1,
        layer_types=[kind],
        global_head_dim=sizes["head_dim"],
        rope_parameters={kind: rope_parameters},
        **sizes,
    )
    rotary: Any = Gemma4TextRotaryEmbedding(config)
    return rotary.full_attention_inv_freq, rotary.full_attention_attention_scaling


def apply_rope(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first w widths of [..., a, d] by the cos and sin [..., w] of its positions
    (half-split layout); the others stay."""
    turned, fixed = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    turned = turned * cos[..., None, :] + rotated * sin[..., None, :]
    return torch.cat([turned, fixed], dim=-1) if fixed.shape[-1] else turned
