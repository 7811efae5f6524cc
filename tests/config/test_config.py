"""Bad settings are refused before any work, with the numbers and the way out."""

import re

import pytest

from dspark_megatron.config.loading import config_from_dict, load_config
from dspark_megatron.errors import ConfigError
from dspark_megatron.shape import draft_shape
from dspark_megatron.shape.layout import check_batch_size, check_layout, padded_vocab_size
from support.paths import ROOT
from support.tiny_target import make_target, tiny_config


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


MINIMAL = """
target: {path: somewhere}
data: {train_files: [chats.jsonl]}
train: {output_dir: runs/x, iterations: 10}
"""


def test_defaults_are_the_papers(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    assert (config.model.block_size, config.model.num_anchors, config.model.num_layers) == (
        7,
        512,
        5,
    )
    assert (config.loss.terms.ce, config.loss.terms.l1) == (0.1, 0.9)
    assert config.min_loss_tokens == 14
    assert config.optimizer.lr == 6e-4


def test_a_key_of_an_older_version_means_the_new_one(tmp_path):
    target = "target: {path: somewhere, check_teacher_logits: false}"
    old = MINIMAL.replace("target: {path: somewhere}", target)
    assert not load_config(write(tmp_path, old)).target.check_logits
    assert load_config(write(tmp_path, old), ["target.check_logits=true"]).target.check_logits
    new = write(tmp_path, MINIMAL)
    assert not load_config(new, ["target.check_teacher_logits=false"]).target.check_logits
    with pytest.raises(ConfigError, match="check_teacher_logits is now called target.check_logits"):
        load_config(new, ["target.check_teacher_logits=false", "target.check_logits=true"])


def test_overrides_are_typed(tmp_path):
    config = load_config(
        write(tmp_path, MINIMAL),
        [
            "optimizer.lr=3e-4",
            "model.target_layer_ids=[1, 2]",
            "loss.loss_decay_gamma=null",
            "train.iterations=5",
        ],
    )
    assert config.optimizer.lr == 3e-4
    assert config.model.target_layer_ids == [1, 2]
    assert config.loss.loss_decay_gamma is None
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "model.block_sise=7",
            "unknown config key model.block_sise; did you mean model.block_size?",
        ),
        ("modell.block_size=7", "unknown config key modell; did you mean model?"),
        ("block_size=7", "must look like section.key=value"),
        ("model.block_size=seven", "model.block_size must be of type int, got 'seven'"),
        ("model.block_size=7.5", "must be of type int"),
        ("model.block_size=true", "must be of type int"),
        ("optimizer.lr=fast", "optimizer.lr must be of type float"),
        ("data.train_files=chats.jsonl", "data.train_files must be of type list"),
        ("model=5", "must look like section.key=value"),
        ("model.markov_head_type=gatd", "did you mean 'gated'?"),
        ("model.markov_rank=0", "set model.markov_rank > 0 or "),
        ("train.epochs=1", "give exactly one of train.iterations (10) and train.epochs (1.0)"),
        ("loss.loss_decay_gamma=0", "must be > 0, or null"),
        ("target.shard_across_data_parallel=-1", "must be >= 0"),
        ("parallel.context_parallel=2", "must be 1: samples are not split"),
        ("evaluate.temperature=-1", "0 is greedy"),
        ("train.dtype=fp8", "must be one of bfloat16, float32"),
        ("loss.weighting.alpha=0", "loss.weighting.alpha (0.0) must be in (0, 1]"),
        ("train.exit_duration_minutes=0", "train.exit_duration_minutes (0.0) must be > 0"),
    ],
)
def test_bad_values(tmp_path, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, MINIMAL), [override])
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["confidence_weights=reach", "confidence_stop_gradient=true"])
@pytest.mark.parametrize(
    "silent", ["model.enable_confidence_head=false", "loss.confidence_head_alpha=0"]
)
def test_options_of_the_confidence_loss_need_one(tmp_path, key, silent):
    load_config(write(tmp_path, MINIMAL), [f"loss.{key}"])
    with pytest.raises(ConfigError, match=f"loss.{key.split('=')[0]} .* about the confidence head"):
        load_config(write(tmp_path, MINIMAL), [f"loss.{key}", silent])


def test_reach_needs_a_divisor_that_no_slot_is_too_small_for(tmp_path):
    keys = ["loss.confidence_weights=reach", "loss.loss_decay_gamma=0.05"]
    with pytest.raises(ConfigError, match="leaves slot 6 no weight in fp32"):
        load_config(write(tmp_path, MINIMAL), keys)
    load_config(write(tmp_path, MINIMAL), [*keys, "loss.weighting.name=dpace"])


def test_a_choice_is_refused_at_reading_and_when_it_was_set_in_python(tmp_path):
    message = re.escape("train.dtype ('float23') must be one of bfloat16, float32; did you mean")
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"train": {"dtype": "float23"}})
    config = load_config(write(tmp_path, MINIMAL))
    config.train.dtype = "float23"
    with pytest.raises(ConfigError, match=message):
        config.validate()


def test_no_weight_at_all_is_refused(tmp_path):
    weights = ["loss.ce_loss_alpha=0", "loss.l1_loss_alpha=0"]
    load_config(write(tmp_path, MINIMAL), weights)  # the confidence head still learns
    for silent in ("loss.confidence_head_alpha=0", "model.enable_confidence_head=false"):
        with pytest.raises(ConfigError, match="there is nothing to learn: a weight in"):
            load_config(write(tmp_path, MINIMAL), [*weights, silent])


@pytest.mark.parametrize(
    "loss, weight",
    [
        ("{}", 0.9),
        ("{l1_loss_alpha: 0.5}", 0.5),
        ("{tvd_loss_alpha: 0.9}", 0.45),
        ("{preset: speculators}", 0.45),
        ("{preset: speculators, tvd_loss_alpha: 1.8}", 0.9),
        ("{preset: speculators, l1_loss_alpha: 0.7}", 0.7),
        ("{preset: speculators, l1_loss_alpha: 0}", 0.0),
        ("{preset: modelopt, tvd_loss_alpha: 1.0}", 0.5),
        ("{l1_loss_alpha: 0.7, tvd_loss_alpha: 0.0}", 0.7),  # as older versions saved them
        ("{l1_loss_alpha: 0.0, tvd_loss_alpha: 0.8}", 0.4),
        ("{preset: modelopt, l1_loss_alpha: 0.0, tvd_loss_alpha: 0.0}", 0.0),
    ],
)
def test_the_distance_is_what_its_one_name_says(tmp_path, loss, weight):
    config = load_config(write(tmp_path, f"{MINIMAL}\nloss: {loss}\n"))
    assert config.loss.terms.l1 == weight
    assert config_from_dict(config.to_dict()) == config


def test_both_names_of_the_distance_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="they are one term"):
        load_config(write(tmp_path, MINIMAL), ["loss.tvd_loss_alpha=0.9", "loss.l1_loss_alpha=0.9"])


def test_behind_the_anchor_a_slot_is_learnt_by_its_label_alone(tmp_path):
    """The preset knows it, and a saved config of another layout does not."""
    behind = ["model.sample_from_anchor=false", "model.block_size=8"]
    preset = ["loss.preset=speculators"]
    config = load_config(write(tmp_path, MINIMAL), behind + preset)
    assert (config.loss.slot_mask, config.loss.anchor_rule) == ("label", "token")
    assert config.min_loss_tokens == 14, "twice the tokens that a block drafts"
    assert load_config(write(tmp_path, config.to_yaml()), preset) == config
    with pytest.raises(
        ConfigError, match="slot_mask .'input'. must be 'label'.*set loss.slot_mask"
    ):
        load_config(write(tmp_path, MINIMAL), [*behind, "loss.slot_mask=input"])
    saved = write(tmp_path, load_config(write(tmp_path, MINIMAL), preset).to_yaml())
    with pytest.raises(ConfigError, match="slot_mask"):
        load_config(saved, behind)
    assert load_config(saved, behind, trains=False), "what is not trained learns no slot"


def test_a_preset_on_the_command_line_must_reach_its_keys(tmp_path):
    """A saved config gives every key, so another preset would change nothing."""
    assert load_config(write(tmp_path, MINIMAL), ["loss.preset=modelopt"]).loss.anchor_rule == (
        "token"
    )
    saved = write(tmp_path, load_config(write(tmp_path, MINIMAL)).to_yaml())
    with pytest.raises(ConfigError) as error:
        load_config(saved, ["loss.preset=modelopt"])
    assert "loss.preset=modelopt does not reach keys that the file gives" in str(error.value)
    assert "loss.anchor_rule (label), loss.supervised_slots (prefix)" in str(error.value)
    others = ["anchor_rule=token", "supervised_slots=all", "normalization=local"]
    changes = ["loss.preset=modelopt", *(f"loss.{other}" for other in others)]
    assert load_config(saved, changes).loss.normalization == "local"
    load_config(saved, ["loss.preset=deepspec"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("- a\n- b", "must hold sections"),
        ("a: [", "is not valid YAML"),
        ("model: 3", "model must be a section"),
    ],
)
def test_bad_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(tmp_path / "none.yaml")


@pytest.fixture(scope="module")
def target_config(tmp_path_factory):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(make_target(tmp_path_factory.mktemp("t") / "target"))


@pytest.mark.parametrize(
    "model, message",
    [
        ({"target_layer_ids": []}, "is empty"),
        ({"target_layer_ids": [0, 3]}, "must lie in [0, 2]: the target has 4 layers"),
        ({"target_layer_ids": [-1, 2]}, "must lie in [0, 2]"),
        ({"target_layer_ids": [2, 0]}, "strictly increasing"),
        ({"target_layer_ids": [1, 1]}, "strictly increasing"),
        ({"mask_token_id": None}, "model.mask_token_id is missing"),
        ({"mask_token_id": 301}, "must be in the target's vocabulary [0, 301)"),
        ({"mask_token_id": -1}, "must be in the target's vocabulary"),
        ({"mask_token_id": "pad"}, "must not be the pad token"),
        ({"mask_token_id": "eos"}, "must not be the eos token"),
        ({"num_attention_heads": 6}, "must be divisible by key/value heads (4)"),
    ],
)
def test_rules_between_draft_and_target(tiny_run, target_config, model, message):
    special = {"pad": target_config.pad_token_id, "eos": target_config.eos_token_id}
    if model.get("mask_token_id") in special:
        model = {"mask_token_id": special[model["mask_token_id"]]}
    config = tiny_config(tiny_run, model=model)
    with pytest.raises(ConfigError) as error:
        draft_shape(config.model, target_config)
    assert message in str(error.value)


def test_dynamic_rope_is_refused(tiny_run, target_config):
    import copy

    other = copy.deepcopy(target_config)
    other.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ConfigError, match="rope_type"):
        draft_shape(tiny_config(tiny_run).model, other)


def test_heads_must_divide_by_the_tensor_parallel_size(tiny_run, target_config):
    config = tiny_config(tiny_run, parallel={"tensor_parallel": 8})
    shape = draft_shape(config.model, target_config)
    with pytest.raises(ConfigError) as error:
        check_layout(config, shape, target_config, 8)
    assert "key/value heads (4) must be divisible by parallel.tensor_parallel (8)" in str(
        error.value
    )
    assert "[1, 2, 4]" in str(error.value)
    with pytest.raises(ConfigError, match="launch a multiple of 8"):
        check_layout(config, shape, target_config, 4)


def test_batches_must_split_evenly(tiny_run):
    train = tiny_config(tiny_run, train={"global_batch_size": 10}).train
    with pytest.raises(ConfigError) as error:
        check_batch_size(train, 4)
    assert "(10)" in str(error.value) and "= 4; the nearest that works is 8" in str(error.value)
    check_batch_size(train, 5)


def test_padding_of_the_vocabulary():
    assert [padded_vocab_size(301, tp) for tp in (1, 2, 3, 4)] == [301, 302, 303, 304]


CONFIGS = [p for p in sorted(ROOT.glob("examples/**/*.yaml")) if p.parent.name != "kubernetes"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_recipe_is_valid(path):
    load_config(path)


def test_overrides_may_stand_on_either_side_of_a_flag():
    from dspark_megatron.train import parse_arguments

    line = ["--config", "run.yaml", "train.seed=1", "--dry-run", "train.epochs=2"]
    assert parse_arguments(line).overrides == ["train.seed=1", "train.epochs=2"]


def test_a_part_of_a_section_takes_overrides_by_key(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("target: {path: T}\nmodel: {attention: {window: 64, sink: true}}")
    overrides = ["model.attention.window=32", "model.attention.causal=sliding"]
    attention = load_config(file, overrides, trains=False).model.attention
    assert (attention.window, attention.sink, attention.causal) == (32, True, "sliding")
    with pytest.raises(ConfigError, match="did you mean model.attention.window?"):
        load_config(file, ["model.attention.windows=3"], trains=False)
    with pytest.raises(ConfigError, match="causal.*must be one of none, sliding, all"):
        load_config(file, ["model.attention.causal=some"], trains=False)
    with pytest.raises(ConfigError, match="give one of the two"):
        load_config(file, ["model.attention=3", "model.attention.sink=true"], trains=False)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.attention.window=6"], "at least model.block_size"),
        (["model.attention.sliding_layers=[0]"], "window is null"),
        (["model.attention.causal=sliding"], "window is null"),
        (["model.attention.window=9", "model.attention.sliding_layers=[5]"], r"in \[0, 4\]"),
        (["model.sample_from_anchor=false", "model.block_size=1"], "at least 2"),
    ],
)
def test_attention_that_no_draft_can_have(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, ["target.path=T", *overrides], trains=False)


@pytest.mark.parametrize("override", ["model.rope_parameters.factor=8", "model.attentoin.window=8"])
def test_an_override_gives_a_key_whole_that_has_no_keys_of_its_own(override):
    with pytest.raises(
        ConfigError,
        match="must give a key whole.* only model.attention, loss.terms, loss.weighting and",
    ):
        load_config(None, ["target.path=T", override], trains=False)
