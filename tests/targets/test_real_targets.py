"""docs/targets.md says of published targets what the commands say of them."""

import json
import re

import pytest

from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.cost.machine import Machine
from dspark_megatron.planning.dry_run import describe_run
from dspark_megatron.planning.recommend import Wish, recommend
from support.paths import ROOT
from support.real_targets import TARGETS

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs" / "targets.md"
ROWS = {
    name: (model_type, result)
    for name, model_type, result in re.findall(
        r"^\| (\S+/\S+) \| `(.+?)` \| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE
    )
}
NEEDS = {
    name: re.findall("`(.+?)`", result)
    for name, (_, result) in ROWS.items()
    if not result.startswith("refused")
}
REFUSED = {
    name: re.findall("`(.+?)`", result)
    for name, (_, result) in ROWS.items()
    if result.startswith("refused")
}
RUN = ["data.train_files=[none]", "train.iterations=1", "train.output_dir=none"]
DRAFT = ["model.target_layer_ids=[1,3,5]", "model.mask_token_id=5"]


@pytest.fixture
def dry_run(tmp_path):
    """What `--dry-run` says of a target of that name with these keys."""

    def dry_run(name, *keys, **changes):
        said = {key: x for key, x in (TARGETS[name] | changes).items() if x is not None}
        (tmp_path / "config.json").write_text(json.dumps(said))
        config = load_config(None, [f"target.path={tmp_path}", *RUN, *DRAFT, *keys])
        return describe_run(config, 1)

    return dry_run


def test_every_row_has_a_config():
    assert {name: model_type for name, (model_type, _) in ROWS.items()} == {
        name: config["model_type"] for name, config in TARGETS.items()
    }
    assert len(ROWS) >= 30


@pytest.mark.parametrize("name", NEEDS)
def test_a_target_plans_with_the_keys_of_its_row_and_not_without(dry_run, name):
    assert "draft:" in dry_run(name, *NEEDS[name])
    for key in NEEDS[name]:
        others = [other for other in NEEDS[name] if other != key]
        with pytest.raises(ConfigError, match=re.escape(key.partition("=")[0])) as error:
            dry_run(name, *others)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_target_is_refused_by_every_command_with_the_reason_of_its_row(dry_run, tmp_path, name):
    with pytest.raises(ConfigError) as error:
        dry_run(name)
    with pytest.raises(ConfigError) as planned:
        recommend(Wish(str(tmp_path), overrides=DRAFT), Machine(8, 1, 74.5))
    assert str(planned.value) == str(error.value)
    assert "\n" not in str(error.value)
    for reason in REFUSED[name]:
        assert reason in str(error.value)


def test_kimi_k2_as_deepseek_v3(dry_run):
    keys = NEEDS["deepseek-ai/DeepSeek-V3.1"]
    dry_run("moonshotai/Kimi-K2-Instruct", *keys, model_type="deepseek_v3", auto_map=None)


def test_code_of_a_folder_is_not_run_and_nothing_is_asked(dry_run, tmp_path, monkeypatch):
    def asked(*_):
        raise AssertionError("a question")

    monkeypatch.setattr("builtins.input", asked)
    for module in ("configuration_own", "modeling_own"):
        (tmp_path / f"{module}.py").write_text("raise AssertionError('code of the folder')\n")
    with pytest.raises(ConfigError, match="never run"):
        dry_run("moonshotai/Kimi-K2-Instruct")
    dry_run("microsoft/Phi-4-mini-instruct", *NEEDS["microsoft/Phi-4-mini-instruct"])


def test_a_tokenizer_that_is_code_is_refused_with_the_way_out(dry_run, tmp_path):
    own = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"auto_map": own, "tokenizer_class": "OwnTokenizer"}))
    (tmp_path / "tokenization_own.py").write_text("raise AssertionError('code of the folder')\n")
    keys = NEEDS["deepseek-ai/DeepSeek-V3.1"]
    with pytest.raises(ConfigError, match="never run; save the tokenizer once") as error:
        dry_run("moonshotai/Kimi-K2-Instruct", *keys, model_type="deepseek_v3", auto_map=None)
    assert "trust_remote_code" not in str(error.value)


def test_layers_with_other_heads_leave_them_to_the_user(dry_run):
    """Gemma 4: sizes by layer, and a RoPE that no draft has."""
    name = "google/gemma-4-31B-it"
    with pytest.raises(ConfigError, match="layers differ in num_key_value_heads and head_dim"):
        dry_run(name)
    heads = ["model.num_attention_heads=32", "model.num_key_value_heads=8", "model.head_dim=128"]
    with pytest.raises(ConfigError, match="'proportional' .*turns a part of each head") as error:
        dry_run(name, *heads)
    assert "length" not in str(error.value)


def test_a_scale_of_one_is_none(dry_run):
    dry_run("ibm-granite/granite-3.3-8b-instruct", logits_scaling=1.0)


@pytest.mark.parametrize("name", ["microsoft/phi-4", "google/gemma-3-27b-it"])
def test_flash_attention_is_the_machine_s_to_have(dry_run, name):
    dry_run(name, "target.attention=flash_attention_2")


@pytest.mark.parametrize(
    "value, message",
    [
        ("{rope_theta: 0}", "rope_theta > 0"),
        ("{rope_type: linear}", "rope_theta > 0"),
        ("{rope_theta: 1e4, rope_type: dynamic}", "'dynamic' of model.rope_parameters must be one"),
        ("{rope_theta: 1e4, rope_interleaved: true}", "keys that a draft's RoPE does not have"),
        ("{rope_theta: 1e4, partial_rotary_factor: 1.5}", "partial_rotary_factor .1.5. must be in"),
        ("{rope_theta: 1e4, partial_rotary_factor: 0.01}", "even number of a head's 128 widths"),
        ("{rope_theta: 1e4, rope_type: yarn, factor: 0.5}", "factor .0.5. must be at least 1"),
        ("{rope_theta: 1e4, rope_type: linear, factor: .nan}", "without finite|at least 1"),
        ("{rope_theta: 1e4, rope_type: linear}", "cannot be computed"),
        ("{rope_theta: 1e4, factor: 16}", "'default' does not read ..'factor'.."),
        ("{rope_theta: 1e4, rope_type: linear, factor: 2, beta_fast: 9}", "'linear' does not read"),
        (
            "{rope_theta: 1e4, rope_type: yarn, factor: 4, beta_fast: 1, beta_slow: 32}",
            "beta_fast .1. must be above its beta_slow .32.",
        ),
        (
            "{rope_theta: 1e4, rope_type: yarn, factor: 4, mscale: -9, mscale_all_dim: 1}",
            "multiplies cos and sin by -",
        ),
        ("1e4", "must be of type dict"),
    ],
)
def test_a_rope_of_its_own_that_cannot_be(dry_run, value, message):
    with pytest.raises(ConfigError, match=message):
        dry_run("microsoft/Phi-4-mini-instruct", f"model.rope_parameters={value}")


def test_a_config_that_its_class_refuses(dry_run):
    with pytest.raises(ConfigError, match="Transformers cannot read .*config.json: ") as error:
        dry_run("Qwen/Qwen3-32B", layer_types=["full_attention"])
    assert "\n" not in str(error.value)


def test_a_target_without_positions_is_told_what_to_add(dry_run):
    bloom = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 64}
    with pytest.raises(ConfigError, match="must say its max_position_embeddings; put it into"):
        dry_run("Qwen/Qwen3-32B", "target.attention=eager", **bloom, max_position_embeddings=None)
