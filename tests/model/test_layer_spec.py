"""The user's own classes in the draft's layers: the same run where they change nothing, and refused
where a checkpoint could not hold them."""

import sys

import pytest

from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.dry_run import describe_run
from dspark_megatron.run.check import check
from support.tiny_target import tiny_config
from support.training_runs import curve, run_training, untimed


def train(pool, tiny_run, output, tp, layer_spec, **data):
    config = tiny_config(
        tiny_run,
        model={"layer_spec": layer_spec},
        data=data,
        parallel={"tensor_parallel": tp, "sequence_parallel": True},
        train={"output_dir": str(output), "iterations": 3, "recompute_activations": True},
    )
    pool.run(run_training, world=tp, tp=tp, config=config)
    return curve(output)


def times_used(runtime):
    from support.user_layers import MyMLP, MyNorm

    return MyMLP.times, MyNorm.times


@pytest.fixture(scope="module")
def usual(pool, tiny_run, tmp_path_factory):
    return train(pool, tiny_run, tmp_path_factory.mktemp("usual"), 2, [])


@pytest.mark.parametrize("name", ["SAME", "same"])
def test_classes_that_change_nothing(pool, tiny_run, usual, tmp_path, name):
    before = pool.run(times_used, world=2, tp=2)
    rows = train(pool, tiny_run, tmp_path, 2, ["support.user_layers", name])
    assert untimed(rows) == untimed(usual)
    for used, earlier in zip(pool.run(times_used, world=2, tp=2), before, strict=True):
        assert used[0] > earlier[0] and used[1] > earlier[1]


BUILT = [
    ("gated", "unexpected layers.0.mlp.gate"),
    ("no_norm", r"missing layers.0.input_layernorm.weight \[32\]"),
    ("unsplit", r"linear_proj.weight must have shape \[32, 64\], has \[32, 32\]"),
    ("GPT_LAYER", "must import and build: TypeError in .*spec_utils"),
]


@pytest.mark.parametrize("name, message", BUILT)
def test_layers_that_are_no_drafts_are_refused_before_the_data_are_read(
    pool, tiny_run, tmp_path, name, message
):
    with pytest.raises(AssertionError, match=f"(?s)ConfigError.*{message}"):
        spec = ["support.user_layers", name]
        train(pool, tiny_run, tmp_path, 2, spec, train_files=["not there.jsonl"])


IMPORTED = [
    (["no_such_module", "layer"], "ModuleNotFoundError.*no_such_module"),
    (["support.user_layers", "layer"], "AttributeError.*'layer'"),
    (["support.user_layers", "fails"], r"RuntimeError in .*user_layers.py:\d+: on purpose"),
    (
        ["support.user_layers", "LINEAR"],
        "must be a ModuleSpec or a function that returns one, is <class",
    ),
]


@pytest.mark.parametrize("words, message", IMPORTED)
def test_a_name_that_gives_no_spec(tiny_run, words, message):
    config = tiny_config(tiny_run, model={"layer_spec": words})
    with pytest.raises(ConfigError, match=f"model.layer_spec.*{message}"):
        check(config, 1, use="train")


def test_a_config_that_is_only_read_imports_nothing(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "never_imported.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_config(tiny_run, model={"layer_spec": ["never_imported", "layer"]})
    text = describe_run(config, world_size=1)
    assert "never_imported" not in sys.modules
    assert "not known: what the layers of model.layer_spec ['never_imported', 'layer']" in text


@pytest.mark.parametrize(
    "model, message",
    [
        ({"layer_spec": ["one"]}, "must be two words"),
        ({"layer_spec": ["a", "b"], "backend": "auto"}, "takes the place of model.backend"),
    ],
)
def test_settings_that_cannot_be(tiny_run, model, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tiny_run, model=model)
