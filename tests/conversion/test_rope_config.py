"""Every spelling of the rope is read as Transformers does, and other mathematics is refused."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, Qwen3Config, modeling_rope_utils
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.conversion.layouts.rope_config import rope_of_config
from dspark_megatron.errors import ConfigError
from dspark_megatron.ops.rope import RotaryTable
from dspark_megatron.shape.rope import computable
from dspark_megatron.storage.target_folder import load_target_config
from support.draft_folders import ROPES, export_fp32, reconfigure, write_checkpoint
from support.shapes import VANILLA


def in_rope_parameters(config):
    del config["rope_theta"]
    config.pop("rope_scaling", None)


def in_the_older_keys(config):
    rope = config.pop("rope_parameters")
    config["rope_scaling"] = {k: v for k, v in rope.items() if not k.startswith("rope_")}
    config["rope_scaling"]["type"] = rope["rope_type"]


def theta_at_the_top(config):
    config.pop("rope_scaling", None)
    del config["rope_parameters"]["rope_theta"]


def with_what_targets_hand_on(config):
    config["rope_parameters"] |= {"mrope_section": [1, 1, 1], "mrope_interleaved": True}
    config["rope_parameters"]["partial_rotary_factor"] = 1.0


ROPE_SPELLINGS = [
    in_rope_parameters,
    in_the_older_keys,
    theta_at_the_top,
    with_what_targets_hand_on,
    lambda config: None,  # both, as an export has them
]


@pytest.mark.parametrize("layout", ["hf", "speculators"])
@pytest.mark.parametrize("spell", ROPE_SPELLINGS)
@pytest.mark.parametrize("kind", ROPES)
def test_every_spelling_of_the_rope_is_read_as_transformers_does(
    tmp_path, target, kind, spell, layout
):
    shape = dataclasses.replace(VANILLA, rope_parameters=ROPES[kind])
    draft = export_fp32(
        write_checkpoint(tmp_path / "run", shape), target, tmp_path / "draft", layout
    )
    reconfigure(draft, lambda c: spell(c.get("transformer_layer_config", c)))
    config = json.loads((draft / "config.json").read_text())
    facts = TargetFacts.of(load_target_config(target), "target")
    assert DraftFolder(draft, target=facts).shape.rope_parameters == ROPES[kind]
    rotary = Qwen3RotaryEmbedding(Qwen3Config(**config.get("transformer_layer_config", config)))
    ours = RotaryTable(ROPES[kind], 6, 256)
    assert torch.equal(rotary.inv_freq, ours.inv_freq)
    assert rotary.attention_scaling == ours.attention_scaling


def test_yarn_without_its_original_length_takes_the_configs(draft):
    """The way Qwen's model cards have it."""
    scaling = {"type": "yarn", "factor": 4.0}
    reconfigure(draft, lambda c: c.pop("rope_parameters") and c.update(rope_scaling=scaling))
    ours = DraftFolder(draft).shape
    assert ours.rope_parameters["original_max_position_embeddings"] == 256
    theirs = Qwen3RotaryEmbedding(AutoConfig.from_pretrained(draft))
    table = RotaryTable(ours.rope_parameters, 6, 4096)
    assert torch.equal(theirs.inv_freq, table.inv_freq)


@pytest.mark.parametrize("layout", ["hf", "speculators", "modelopt", "specforge"])
@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_a_part_of_each_head_survives_every_layout(tmp_path, target, kind, layout):
    rope = {**ROPES[kind], "partial_rotary_factor": 0.4}
    shape = dataclasses.replace(VANILLA, rope_parameters=rope)
    run = write_checkpoint(tmp_path / "run", shape)
    draft = export_fp32(run, target, tmp_path / "draft", layout)
    config = json.loads((draft / "config.json").read_text())
    said = config.get("transformer_layer_config", config)["rope_parameters"]
    assert (said["partial_rotary_factor"], said["rope_dim"]) == (0.4, 2)
    facts = TargetFacts.of(load_target_config(target), "target")
    read = DraftFolder(draft, target=facts)
    assert read.shape.rope_parameters == rope
    assert not any("leftover" in line for line in read.doubts)


def test_a_part_that_nothing_says_the_width_of_is_left_over(draft):
    places = lambda c: (c, c["rope_parameters"])  # noqa: E731
    for place in range(2):
        reconfigure(draft, lambda c, p=place: places(c)[p].update(partial_rotary_factor=0.5))
        read = DraftFolder(draft)
        assert "partial_rotary_factor" not in read.shape.rope_parameters
        [line] = read.doubts
        assert "leftover of the target's" in line and "--partial-rotary-factor 0.5" in line
    chosen = DraftFolder(draft, rope={"partial_rotary_factor": 0.4})
    assert chosen.shape.rope_parameters["partial_rotary_factor"] == 0.4


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


BAD_ROPE = {
    "rope_type': 'default'} and rope_scaling {'rope_type': 'yarn'": {"rope_scaling": YARN},
    "rope_theta is 5.0 at the top level and 10000.0 in rope_parameters": {"rope_theta": 5.0},
    "keys of which it is not known what they do (['rope_interleaved'])": {
        "rope_parameters": {"rope_theta": 10000.0, "rope_interleaved": True}
    },
    "rope_dim (8) must be at most the head_dim (6)": {
        "rope_parameters": {"rope_theta": 10000.0, "rope_dim": 8}
    },
    "must turn an even number of a head's 6 widths, and turns 3": {
        "rope_parameters": {"rope_theta": 10000.0, "rope_dim": 3}
    },
    "factor (0.5) must be at least 1": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 0.5}
    },
    "rope_type ('foo') must be one of default, linear, llama3, yarn": {
        "rope_parameters": {"rope_type": "foo", "rope_theta": 10000.0}
    },
    "rope_type ('mrope')": {
        "rope_parameters": None,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]},
    },
    "rope_type ('dynamic')": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    },
    "rope_theta ('abc') must be a finite number > 0": {
        "rope_parameters": {"rope_type": "default", "rope_theta": "abc"},
        "rope_theta": "abc",
    },
    "rope_theta (-1.0) must be a finite number > 0": {"rope_parameters": None, "rope_theta": -1.0},
    "rope_theta must be a number > 0, is None": {"rope_parameters": None, "rope_theta": None},
    "cannot be computed: {'rope_type': 'yarn'": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}
    },
    "'factor': 'x'": {"rope_parameters": {"rope_type": "linear", "factor": "x"}},
    "rope_parameters ('x') must be an object": {"rope_parameters": "x"},
    "rms_norm_eps (-1e-06) must be a number in [0, 1)": {"rms_norm_eps": -1e-6},
}


@pytest.mark.parametrize("message", BAD_ROPE)
def test_mathematics_that_is_not_ours_is_refused(draft, message):
    reconfigure(draft, lambda c: c.update(BAD_ROPE[message]))
    with pytest.raises(ConfigError) as error:
        DraftFolder(draft)
    assert message in str(error.value)


def test_a_yarn_that_is_complete_brings_no_warning_of_transformers(monkeypatch):
    said = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(modeling_rope_utils.logger, name, said.append)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0}
    computable({**yarn, "original_max_position_embeddings": 8192}, "a test has")
    assert not said


def test_keys_that_a_rope_of_its_type_does_not_read_are_not_taken_over():
    config = {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    config["rope_scaling"]["beta_fast"] = 9
    expected = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert rope_of_config(config) == expected
