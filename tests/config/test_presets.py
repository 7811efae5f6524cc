"""A preset of the loss sets what it stands for, and no other key."""

from dataclasses import asdict, fields
from typing import get_args

import pytest

from dspark_megatron.config.loading import config_from_dict, load_config
from dspark_megatron.config.objective.loss import LossConfig
from dspark_megatron.config.objective.presets import LOSS_PRESETS
from dspark_megatron.config.objective.words import objective_words
from dspark_megatron.errors import ConfigError

NO_TERMS = dict.fromkeys(
    ("ce", "l1", "kl", "reverse_kl", "js", "renyi_half", "lk_alpha", "lk_hybrid"), 0.0
)
PAPER = {
    "terms": {**NO_TERMS, "ce": 0.1, "l1": 0.9},
    "weighting": {"name": "decay", "alpha": 0.5},
    "confidence_head_alpha": 1.0,
    "confidence_weights": "decay",
    "confidence_stop_gradient": False,
    "loss_decay_gamma": 4.0,
    "ce_labels": "data",
    "anchor_rule": "label",
    "supervised_slots": "prefix",
    "slot_mask": "label",
    "normalization": "global_step",
    "memory_budget_mb": 256,
    "chunk_rows": None,
    "compile": None,
}
SPECULATORS = {
    "anchor_rule": "token",
    "supervised_slots": "all",
    "slot_mask": "input",
    "ce_labels": "target_argmax",
    "normalization": "local_count",
}
EXPECTED = {
    "deepspec": {},
    "modelopt": {"anchor_rule": "token", "supervised_slots": "all", "normalization": "local"},
    "specforge": {"loss_decay_gamma": None, "normalization": "deepspec"},
    "speculators": {**SPECULATORS, "terms": {**NO_TERMS, "ce": 0.1, "l1": 0.45}},
    "speculators_kl": {**SPECULATORS, "terms": {**NO_TERMS, "kl": 1.0}},
    "dpace": {
        "terms": {**NO_TERMS, "ce": 1.0},
        "weighting": {"name": "dpace", "alpha": 0.5},
    },
    "dpard": {
        "terms": {**NO_TERMS, "renyi_half": 1.0},
        "weighting": {"name": "dpard", "alpha": 0.5},
        "confidence_weights": "reach",
        "normalization": "global_samples",
    },
}


def read(overrides, tmp_path=None, text=""):
    """The config of a file's loss section and of overrides."""
    path = tmp_path / "run.yaml" if tmp_path else None
    if path:
        path.write_text(text)
    return load_config(path, ["target.path=T", *overrides], trains=False)


def test_every_preset_is_a_choice():
    kind = next(field.type for field in fields(LossConfig) if field.name == "preset")
    assert set(get_args(kind)) == set(LOSS_PRESETS) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_is_these_values_from_a_file_and_from_the_command_line(name, tmp_path):
    expected = {**PAPER, **EXPECTED[name], "preset": name}
    for overrides, text in ([], f"loss: {{preset: {name}}}"), ([f"loss.preset={name}"], "loss:"):
        config = read(overrides, tmp_path, text)
        assert asdict(config.loss) == expected
        assert config_from_dict(config.to_dict()) == config, "a saved config.yaml means the same"


@pytest.mark.parametrize("name", EXPECTED)
def test_older_keys_change_one_term_of_any_preset(name):
    terms = asdict(config_from_dict({"loss": {"preset": name}}).loss.terms)
    loss = {"preset": name, "ce_loss_alpha": 0.3, "tvd_loss_alpha": 0.5}
    assert asdict(config_from_dict({"loss": loss}).loss.terms) == {**terms, "ce": 0.3, "l1": 0.25}


@pytest.mark.parametrize("name", EXPECTED)
def test_any_preset_knows_blocks_whose_anchor_drafts_nothing(name):
    assert read([f"loss.preset={name}", "model.sample_from_anchor=false"]).loss.slot_mask == "label"


@pytest.mark.parametrize(
    "loss, weighting",
    [
        ("{preset: dpace, weighting: {alpha: 0.3}}", ("dpace", 0.3)),
        ("{preset: dpard, weighting: {alpha: 0.3}}", ("dpard", 0.3)),
        ("{preset: dpard, weighting: }", ("dpard", 0.5)),
        ("{preset: dpard, weighting: {}}", ("dpard", 0.5)),
        ("{preset: dpard, weighting: {name: dpace}}", ("dpace", 0.5)),
        ("{preset: dpace, weighting: {name: decay}}", ("decay", 0.5)),
        ("{weighting: {name: dpace}}", ("dpace", 0.5)),
    ],
)
def test_the_weighting_goes_by_key(tmp_path, loss, weighting):
    found = read([], tmp_path, f"loss: {loss}").loss.weighting
    assert (found.name, found.alpha) == weighting


def test_the_weighting_goes_by_key_on_the_command_line():
    overrides = ["loss.preset=dpace", "loss.weighting.alpha=0.3"]
    found = read(overrides).loss.weighting
    assert (found.name, found.alpha) == ("dpace", 0.3)


@pytest.mark.parametrize(
    "file, overrides, standing",
    [
        ("{weighting: {name: decay}}", ["preset=dpace"], "loss.weighting.name (decay)"),
        ("{terms: {ce: 1}}", ["preset=deepspec"], "loss.terms.ce (1), loss.terms.l1 (0.0)"),
        (
            "{terms: {ce: 0.1, l1: 0.9}}",
            ["preset=dpard", "terms.ce=0", "terms.renyi_half=1"],
            "loss.terms.l1 (0.9)",
        ),
        (
            "{weighting: {name: decay, alpha: 0.5}}",
            ["preset=dpace", "weighting.alpha=0.5"],
            "loss.weighting.name (decay)",
        ),
        ("{loss_decay_gamma: 4}", ["preset=specforge"], "loss.loss_decay_gamma (4)"),
        ("{l1_loss_alpha: 0.9}", ["preset=dpace"], "loss.terms.l1 (0.9)"),
    ],
)
def test_a_preset_on_the_command_line_names_each_key_in_its_way(
    tmp_path, file, overrides, standing
):
    with pytest.raises(ConfigError) as error:
        read([f"loss.{one}" for one in overrides], tmp_path, f"loss: {file}")
    assert f"does not reach keys that the file gives: {standing}; take them" in str(error.value)


def test_a_preset_on_the_command_line_reaches_what_the_file_leaves_out(tmp_path):
    text = "loss: {weighting: {alpha: 0.5}, terms: {ce: 1.0}}"
    loss = read(["loss.preset=dpace"], tmp_path, text).loss
    assert (loss.weighting.name, loss.terms.ce, loss.terms.l1) == ("dpace", 1.0, 0.0)


def test_a_saved_config_takes_another_objective_key_by_key(tmp_path):
    keys = ["preset=dpace", "terms.ce=1", "terms.l1=0", "weighting.name=dpace"]
    loss = read([f"loss.{key}" for key in keys], tmp_path, read([]).to_yaml()).loss
    assert asdict(loss) == {**PAPER, **EXPECTED["dpace"], "preset": "dpace"}


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["preset=dpase"], "did you mean 'dpace'?"),
        (["preset=specforg"], "did you mean 'specforge'?"),
        (["preset=D-PACE"], "did you mean 'dpace'?"),
        (["weighting.name=dparrd"], "did you mean 'dpard'?"),
        (["weighting=dpace"], "loss.weighting must be a section (a YAML mapping"),
        (["weighting=dpace"], "of name, alpha), got 'dpace'"),
        (["terms.renyi=1"], "did you mean loss.terms.renyi_half?"),
        (["terms.rkl=1"], "loss.terms.rkl is called loss.terms.reverse_kl here"),
        (["terms.tv=1"], "loss.terms.tv is called loss.terms.tvd here"),
        (["weighting.alpha=0"], "loss.weighting.alpha (0.0) must be in (0, 1]"),
        (["weighting.alpha=0.3"], "loss.weighting.name is decay, whose rate is"),
        (["preset=dpace", "weighting.name=decay", "weighting.alpha=0.3"], "set the name too"),
    ],
)
def test_objectives_that_are_not_known(overrides, message):
    with pytest.raises(ConfigError) as error:
        read([f"loss.{one}" for one in overrides])
    assert message in str(error.value)


PLAIN = "normalization: global_step; anchors, slots and labels as in DeepSpec"


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            [],
            f"(0.1 ce + 0.9 l1) by exp(-k/4) + 1 confidence by exp(-k/4); {PLAIN}",
        ),
        (
            ["preset=dpace", "confidence_stop_gradient=true"],
            "(1 ce) by dpace with alpha 0.5 + 1 confidence, of its head alone, by "
            f"exp(-k/4); {PLAIN}",
        ),
        (
            ["preset=dpard"],
            "(1 renyi_half) by dpard with alpha 0.5 + 1 confidence by reach; "
            "normalization: global_samples; anchors, slots and labels as in DeepSpec",
        ),
        (
            ["preset=speculators_kl", "confidence_head_alpha=0", "loss_decay_gamma=null"],
            "(1 kl) by 1; normalization: local_count; ce_labels: target_argmax, "
            "anchor_rule: token, supervised_slots: all, slot_mask: input",
        ),
        (["terms.ce=0", "terms.l1=0"], f"1 confidence by exp(-k/4); {PLAIN}"),
    ],
)
def test_an_objective_in_one_line(overrides, words):
    loss = read([f"loss.{one}" for one in overrides]).loss
    assert objective_words(loss, with_confidence_head=True) == words


@pytest.mark.parametrize("text", ["{tvd: 0.9}", "{tvd: 9e-1}", "{tvd: '0.9'}"])
def test_tvd_is_half_of_l1_however_it_is_written(tmp_path, text):
    assert read([], tmp_path, f"loss: {{terms: {text}}}").loss.terms.l1 == 0.45
    assert read([f"loss.terms={text}"]).loss.terms.l1 == 0.45


def test_a_whole_set_on_the_command_line_leaves_nothing_of_the_file(tmp_path):
    text = "loss: {terms: {ce: 0.1, kl: 0.9}}"
    assert asdict(read(["loss.terms={ce: 1}"], tmp_path, text).loss.terms) == {**NO_TERMS, "ce": 1}
    assert asdict(read(["loss.terms={tvd: 1}"]).loss.terms) == {**NO_TERMS, "l1": 0.5}
    assert read(["loss.terms.ce=1"], tmp_path, text).loss.terms.kl == 0.9


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["loss.terms.tvd=-1"], "loss.terms.tvd (-1) must be a finite number >= 0"),
        (["loss.terms.tvd=x"], "loss.terms.tvd ('x') must be a finite number >= 0"),
        (["loss.ce_loss_alpha=x"], "loss.ce_loss_alpha ('x') must be a finite number >= 0"),
        (["loss.terms.kl=1.0e+300"], "loss.terms.kl (1e+300) must be at most 1,000,000"),
        (["loss.weighting=[]"], "loss.weighting must be a section"),
        (["loss.weighting.name=null"], "must be one of decay, dpace, dpard"),
        (["loss.preset=dpard", "model.enable_confidence_head=false"], "confidence_weights=decay"),
        (
            [
                *("loss.terms={}", "loss.confidence_stop_gradient=true"),
                "optimizer.overlap_grad_reduce=true",
            ],
            "the backbone gets none",
        ),
        (["optimizer.muon_steps=3"], "is of Muon, and optimizer.name is 'adamw'"),
        (["optimizer.muon_weight_decay=0"], "is of Muon, and optimizer.name is 'adamw'"),
        (["optimizer.decay_shape=linear"], "is of the schedule wsd, and optimizer.schedule is"),
    ],
)
def test_keys_that_would_do_nothing_or_something_else(overrides, message):
    with pytest.raises(ConfigError) as error:
        read(overrides)
    text = str(error.value)
    assert message in text and "did you mean" not in text
