"""cos and sin are those of Transformers for every RoPE that can be chosen, of a whole head and of a
part of it."""

import pytest
import torch
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeRotaryEmbedding,
    apply_rotary_pos_emb,
)

from dspark_megatron.ops.rope import RotaryTable, apply_rope
from support.draft_folders import ROPES

YARN = ROPES["yarn"]
KINDS = ROPES | {
    "yarn with mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn with its own factor": {**YARN, "attention_factor": 1.2},
}


@pytest.mark.parametrize("share", [1, 0.5, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_and_rotation_are_those_of_transformers(kind, share):
    rope = {**KINDS[kind], "partial_rotary_factor": share}
    config = Glm4MoeConfig(head_dim=40, rope_parameters=dict(rope), max_position_embeddings=256)
    rotary, positions = Glm4MoeRotaryEmbedding(config), torch.tensor([[0, 1, 63, 64, 255, 4000]])
    states = torch.randn(1, 6, 3, 40)
    cos, sin = rotary(states, positions)
    ours = RotaryTable(rope if share < 1 else KINDS[kind], 40, 256)
    table = ours(positions, torch.float32)
    assert torch.equal(table[0], cos) and torch.equal(table[1], sin)
    assert cos.shape[-1] == int(40 * share)
    assert (ours.attention_scaling != 1) == kind.startswith("yarn")
    wanted, _ = apply_rotary_pos_emb(states, states, cos, sin, unsqueeze_dim=2)
    assert torch.equal(apply_rope(states, *table), wanted)
