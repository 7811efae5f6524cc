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

    Transformers' own Qwen3 class makes the frequencies, since every engine that loads the export
    does the same. The frequencies are a plain fp32 attribute, not a module buffer: a bf16 cast of
    the draft must not round them.
    """

    def __init__(
        self, rope_parameters: dict[str, Any], head_dim: int, max_position_embeddings: int
    ) -> None:
        rope = dict(rope_parameters)
        # Frequencies of a part of a head are those of a whole head as wide as the part.
        width = int(head_dim * rope.pop("partial_rotary_factor", 1))
        config = Qwen3Config(
            hidden_size=width,
            num_attention_heads=1,
            head_dim=width,
            rope_parameters=rope,
            max_position_embeddings=max_position_embeddings,
        )
        rotary = Qwen3RotaryEmbedding(config)
        self.inv_freq: Tensor = rotary.inv_freq.float()  # [w/2]
        self.attention_scaling: float = rotary.attention_scaling

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[...] int64 positions -> cos and sin [..., w], computed in fp32, cast once."""
        self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[..., None].float() * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return (cos * self.attention_scaling).to(dtype), (sin * self.attention_scaling).to(dtype)


def apply_rope(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first w widths of [..., a, d] by the cos and sin [..., w] of its positions
    (half-split layout); the others stay."""
    turned, fixed = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    turned = turned * cos[..., None, :] + rotated * sin[..., None, :]
    return torch.cat([turned, fixed], dim=-1) if fixed.shape[-1] else turned
