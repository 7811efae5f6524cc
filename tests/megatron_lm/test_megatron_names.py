"""Megatron's argument names and ours: the table in the docs, both sides' defaults, the values."""

import argparse

import pytest

from dspark_megatron.config import Config
from dspark_megatron.config.loading import config_from_dict
from dspark_megatron.errors import ConfigError
from dspark_megatron.megatron_lm.names import ARGUMENTS, settings, table
from support.megatron_parsing import parsed
from support.paths import ROOT

PAGE = ROOT / "docs" / "megatron_arguments.md"


def test_the_docs_hold_the_table():
    assert table() in PAGE.read_text(encoding="utf-8"), f"{PAGE.name} must hold\n{table()}"


def test_every_key_is_one_of_ours_and_comes_once():
    keys = [entry.key for entry in ARGUMENTS]
    ours = {f"{name}.{key}" for name, section in Config().to_dict().items() for key in section}
    assert len(set(keys)) == len(keys)
    assert not set(keys) - ours


def test_megatrons_parser_knows_the_names_and_defaults():
    pytest.importorskip("megatron.training.arguments", reason="needs Megatron-Core 0.19's wheel")
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    theirs = {name: action for action in parser._actions for name in action.option_strings}
    assert {entry.name: theirs[entry.name].default for entry in ARGUMENTS} == {
        entry.name: entry.default for entry in ARGUMENTS
    }
    line = "--lr 1e-3 --min-lr 1e-4 --bf16 --save run --load run --tensor-model-parallel-size 2"
    assert settings(parser.parse_args(line.split()))["optimizer"]["min_lr_ratio"] == 0.1


def test_arguments_become_a_config():
    arguments = parsed(
        lr=1e-3,
        min_lr=1e-4,
        lr_warmup_iters=5,
        train_iters=50,
        global_batch_size=16,
        micro_batch_size=2,
        data_path=["0.25", "a", "0.75", "b"],
        valid_data_path=["c"],
        eval_interval=10,
        recompute_granularity="full",
        save="runs/x",
        load="runs/x",
        bf16=True,
        tensorboard_dir="elsewhere",
        tokenizer_model="target",
    )
    config = config_from_dict(settings(arguments))
    config.validate()
    assert config.parallel.tensor_parallel == 4
    assert config.target.path == "target"
    assert (config.data.train_files, config.data.weights) == (["a", "b"], [0.25, 0.75])
    assert config.evaluate.heldout_samples == 1600
    assert (config.optimizer.min_lr_ratio, config.optimizer.warmup_ratio) == (0.1, 0.1)
    assert config.optimizer.weight_decay == 0.01  # Megatron's default, not ours
    assert (config.train.output_dir, config.train.resume) == ("runs/x", True)
    assert config.train.dtype == "bfloat16"
    assert config.train.recompute_activations and config.train.tensorboard


def test_what_is_left_open_keeps_our_default():
    sections = settings(parsed())
    assert not {"lr", "min_lr_ratio", "warmup_ratio"} & set(sections["optimizer"])
    assert "data" not in sections


def test_prefixes_without_weights():
    assert settings(parsed(data_path=["a", "b"]))["data"] == {"train_files": ["a", "b"]}


def test_weights_of_another_run():
    train = settings(parsed(save="new", load="old", finetune=True))["train"]
    assert (train["resume"], train["initial_checkpoint"]) == (False, "old")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"fp16": True}, "--fp16"),
        ({"save": "new", "load": "old"}, "--load old must be --save"),
        ({"recompute_granularity": "selective"}, "give full"),
        ({"expert_model_parallel_size": 4}, "--expert-tensor-parallel-size 1 with it, not 4"),
        ({"lr_warmup_iters": 10}, "give both"),
    ],
)
def test_what_has_no_counterpart_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        settings(parsed(**given))
