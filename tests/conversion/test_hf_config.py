"""The config.json of an export, as Transformers reads it."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dspark_megatron.conversion.layouts.hf_config import (
    DraftDescription,
    description_of_config,
    hugging_face_config,
)
from dspark_megatron.ops.rope import RotaryTable
from dspark_megatron.shape import DraftShape
from support.draft_folders import ROPES
from support.shapes import FOLDER_SHAPES, VANILLA

LAYOUT_KEYS = """architectures model_type dtype torch_dtype vocab_size hidden_size intermediate_size
num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act rms_norm_eps
attention_bias attention_dropout initializer_range max_position_embeddings rope_theta
rope_parameters layer_types sliding_window use_sliding_window max_window_layers tie_word_embeddings
use_cache bos_token_id eos_token_id pad_token_id block_size sample_from_anchor mask_token_id
target_layer_ids num_target_layers num_anchors markov_rank markov_head_type enable_confidence_head
confidence_head_with_markov dflash_config""".split()


def config_of(shape: DraftShape) -> dict:
    return hugging_face_config(
        DraftDescription(shape=shape),
        target_config=Qwen3Config(bos_token_id=7, eos_token_id=8, pad_token_id=None),
        dtype=torch.bfloat16,
    )


def test_config_has_exactly_the_keys_of_the_layout(shape):
    config = config_of(shape)
    assert sorted(config) == sorted(LAYOUT_KEYS)
    assert config["architectures"] == ["Qwen3DSparkModel"] and config["dtype"] == "bfloat16"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (7, 8, None)
    nested = config["dflash_config"]
    assert nested["projector_type"] == "dspark" and nested["confidence_head_alpha"] == 1.0
    assert nested["attention_mode"] == ("mha" if shape is FOLDER_SHAPES["mha"] else "gqa")
    copies = nested.keys() - {"projector_type", "attention_mode", "confidence_head_alpha"}
    assert len(copies) == 6 and all(nested[key] == config[key] for key in copies)
    assert description_of_config(json.loads(json.dumps(config))).shape == shape


@pytest.mark.parametrize("kind", ROPES)
def test_transformers_reads_the_config_and_its_rope(tmp_path, kind):
    shape = dataclasses.replace(VANILLA, rope_parameters=ROPES[kind])
    config = config_of(shape)
    assert ("rope_scaling" in config) == (kind != "default")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = RotaryTable(shape.rope_parameters, shape.head_dim, shape.max_position_embeddings)
    for loaded in (AutoConfig.from_pretrained(tmp_path), Qwen3Config.from_pretrained(tmp_path)):
        rotary = Qwen3RotaryEmbedding(loaded)
        assert torch.equal(rotary.inv_freq, ours.inv_freq)
        assert rotary.attention_scaling == ours.attention_scaling
        assert loaded.rope_parameters["rope_theta"] == ROPES[kind]["rope_theta"]
        assert loaded.dtype == torch.bfloat16 and loaded.head_dim == 6
        assert loaded.target_layer_ids == [0, 2, 4] and loaded.num_anchors == 512


@pytest.mark.parametrize("spelling", ["rope_parameters", "legacy"])
@pytest.mark.parametrize("kind", ROPES)
def test_each_rope_spelling_is_complete_alone(tmp_path, kind, spelling):
    shape = dataclasses.replace(VANILLA, rope_parameters=ROPES[kind])
    drop = {"rope_parameters"} if spelling == "legacy" else {"rope_theta", "rope_scaling"}
    config = {key: value for key, value in config_of(shape).items() if key not in drop}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rotary = Qwen3RotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    ours = RotaryTable(shape.rope_parameters, shape.head_dim, shape.max_position_embeddings)
    assert torch.equal(rotary.inv_freq, ours.inv_freq)
