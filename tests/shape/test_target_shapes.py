"""What the draft takes over from targets that have no such thing, and what it must be told."""

import pytest

from dspark_megatron.errors import ConfigError
from dspark_megatron.ops.rope import RotaryTable
from dspark_megatron.shape import draft_shape
from dspark_megatron.shape.layout import check_layout
from dspark_megatron.shape.rope import beyond_yarn
from support.target_families import FAMILIES, SIZES
from support.tiny_target import tiny_config

OWN_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def target(model_type, **overrides):
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**SIZES, **FAMILIES[model_type], **overrides})


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("left_out", OWN_HEADS)
def test_latent_attention_leaves_the_heads_to_the_user(tiny_run, family, left_out):
    chosen = {name: size for name, size in OWN_HEADS.items() if name != left_out}
    with pytest.raises(ConfigError, match=f"latent attention.*model.{left_out}.*for example"):
        draft_shape(tiny_config(tiny_run, model=chosen).model, target(family))


def test_a_draft_for_latent_attention(tiny_run):
    config = tiny_config(tiny_run, model=OWN_HEADS, parallel={"tensor_parallel": 2})
    deepseek = target("deepseek_v3", num_key_value_heads=1)  # what the key says is not used
    shape = draft_shape(config.model, deepseek)
    heads = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    assert heads == (4, 2, 8)
    assert shape.ffn_hidden_size == SIZES["intermediate_size"]
    assert check_layout(config, shape, deepseek, 2) == 1


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss"])
def test_the_width_of_an_expert_is_not_taken_over(tiny_run, family):
    with pytest.raises(ConfigError, match=r"\(48\).*that of one expert.*3 x hidden_size = 96"):
        draft_shape(tiny_config(tiny_run).model, target(family))
    chosen = tiny_config(tiny_run, model={"ffn_hidden_size": 64}).model
    assert draft_shape(chosen, target(family)).ffn_hidden_size == 64


def test_a_family_with_dense_width_beside_its_experts(tiny_run):
    assert draft_shape(tiny_config(tiny_run).model, target("qwen3_moe")).ffn_hidden_size == 48


def test_deepseeks_yarn(tiny_run):
    """`mscale` and `mscale_all_dim` are equal in V3, so cos and sin are not scaled."""
    yarn = dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
    yarn["original_max_position_embeddings"] = 64
    deepseek = target("deepseek_v3", rope_scaling=yarn, rope_theta=10000)
    rope = draft_shape(tiny_config(tiny_run, model=OWN_HEADS).model, deepseek).rope_parameters
    assert rope["rope_type"] == "yarn" and "type" not in rope
    scaled = RotaryTable(rope, 8, 2560)
    plain = RotaryTable({"rope_type": "default", "rope_theta": 10000}, 8, 2560)
    assert scaled.attention_scaling == 1.0
    assert scaled.inv_freq[0] == plain.inv_freq[0]
    assert scaled.inv_freq[-1] == pytest.approx(plain.inv_freq[-1].item() / 40)


def test_yarn_is_scaled_from_the_length_that_the_draft_leaves(tiny_run):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16}

    def original(**model):
        config = tiny_config(tiny_run, model={"rope_parameters": yarn, **model}).model
        return draft_shape(config, target("llama")).rope_parameters[
            "original_max_position_embeddings"
        ]

    assert original() == target("llama").max_position_embeddings
    assert original(max_position_embeddings=65536) == 4096
    given = {**yarn, "original_max_position_embeddings": 64}
    assert original(max_position_embeddings=1000, rope_parameters=given) == 64
    with pytest.raises(ConfigError, match=r"\(1000\) must be a multiple of the factor \(16\)"):
        original(max_position_embeddings=1000)
    assert "reaches 1024 positions (16 x 64)" in beyond_yarn(given, 1025)
    assert not beyond_yarn(given, 1024)


def test_a_partial_factor_of_the_target_is_not_taken_over(tiny_run):
    of_target = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    glm = target("llama", rope_parameters=of_target)
    plain = {"rope_type": "default", "rope_theta": 1e4}
    assert draft_shape(tiny_config(tiny_run).model, glm).rope_parameters == plain
    own = tiny_config(tiny_run, model={"rope_parameters": of_target}).model
    assert draft_shape(own, glm).rope_parameters == of_target


def test_layers_with_positions_of_their_own(tiny_run):
    """Gemma 3: the draft, whose attention is full, takes those of the full-attention layers."""
    from transformers import Gemma3TextConfig

    gemma = Gemma3TextConfig(**SIZES, head_dim=8)
    rope = draft_shape(tiny_config(tiny_run).model, gemma).rope_parameters
    assert rope == {"rope_type": "default", "rope_theta": 1_000_000.0}
