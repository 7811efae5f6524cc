"""A plan that has read the data: its mask token, its counts, and a run that starts as it is."""

import json

import pytest

from dspark_megatron.cli.main import main
from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.dry_run import describe_run
from dspark_megatron.planning.mask_token import mask_tokens
from dspark_megatron.planning.run_data import read_data
from dspark_megatron.run.check import check
from dspark_megatron.run.data import load_run_data
from dspark_megatron.storage.target_folder import load_target_config, load_tokenizer
from support.chat_lines import chat, read_rows, write_jsonl
from support.tiny_target import make_chats, make_target, tiny_config, tiny_settings

TINY = ("model.target_layer_ids=[0,2]", "model.num_layers=2")
NO_RESERVED = 267
"""Bytes, merges and ChatML's four."""


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"))


def names_of(target, stop_ids=()):
    tokenizer, config = load_tokenizer(target), load_target_config(target)
    return [token.name for token in mask_tokens(tokenizer, config, list(stop_ids))]


def test_mask_tokens_in_their_order(target):
    assert names_of(target) == ["<|mask|>", "<|reserved_33|>", "<|reserved_0|>"]
    assert names_of(target, [300]) == ["<|mask|>", "<|reserved_32|>", "<|reserved_0|>"]


def test_rows_that_are_no_token_come_after_reserved_ones(target):
    """Qwen3 has no reserved token, and the paper takes 151669, its first spare row."""
    config = load_target_config(target)
    config.vocab_size = 320
    found = mask_tokens(load_tokenizer(target), config, [])
    assert [token.id for token in found[-2:]] == [301, 319]


def with_mask_in_it(tmp_path, *texts):
    rows = read_rows(make_chats(tmp_path / "plain.jsonl", 32))
    rows += [chat("hello", f"well {text} there in the inn, hello hello") for text in texts]
    return write_jsonl(tmp_path / "chats.jsonl", rows)


def test_a_run_that_starts_as_it_is(target, tmp_path, capsys):
    """The data have the tokenizer's mask token, so another one is taken."""
    data = with_mask_in_it(tmp_path, "<|mask|>")
    file, run = tmp_path / "run.yaml", f"train.output_dir={tmp_path / 'run'}"
    options = ["--taps", "2", "--gpus-per-node", "1", "--global-batch-size", "8", "--json"]
    options += ["--price-per-gpu-hour", "2", "--output", str(file), "--prompts", "chat"]
    assert main(["plan", "--target", str(target), "--data", str(data), *options, *TINY, run]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["mask_token"]["name"] == "<|reserved_33|>" and record["file"] == str(file)
    config = load_config(file)
    assert config.model.mask_token_id == record["mask_token"]["id"] == 300
    dataset = load_run_data(check(config, 1, use="train"), config.data.train_files)
    assert record["data"]["samples"] == len(dataset)
    assert record["data"]["tokens"] == int(dataset.lengths.sum())
    assert config.evaluate.prompt_files == ["chat"]
    assert config.data.max_length == 64 >= dataset.lengths.max()
    cost = record["cost"]
    assert cost["steps"] == -(-10 * len(dataset) // 8)
    assert cost["price"] == pytest.approx(2 * cost["gpu_hours"])
    assert cost["hours"] == pytest.approx(cost["steps"] * record["seconds_per_step"] / 3600)
    assert "to be set" not in file.read_text() and "lr: 0.0006" in file.read_text()
    describe_run(config, 1)


def test_no_token_is_safe(tmp_path):
    target = make_target(tmp_path / "target", vocab_size=NO_RESERVED)
    data = with_mask_in_it(tmp_path, "<|mask|>")
    config = tiny_config(tiny_settings(target, data, tmp_path / "run"), model=NO_MASK)
    with pytest.raises(ConfigError, match=r"the data have each that was tried \(266, <\|mask\|>"):
        read_data(config)


NO_MASK = {"mask_token_id": None}


def test_a_given_mask_token_is_the_only_one(target, tmp_path):
    data = with_mask_in_it(tmp_path, "<|mask|>")
    config = tiny_config(tiny_settings(target, data, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"mask_token_id \(266\) stands 1 times in this line"):
        read_data(config)


def test_lines_that_may_be_left_out_are_not_for_the_mask_token(target, tmp_path):
    data = with_mask_in_it(tmp_path, "<|mask|>")
    settings = tiny_settings(target, data, tmp_path / "run")
    config = tiny_config(settings, model=NO_MASK, data={"skip_bad_lines": 0.5})
    found = read_data(config)
    assert found.mask.id == 300 and not found.report.bad_lines


@pytest.mark.parametrize(
    "options, said",
    [
        (["--data", "none.jsonl"], "data file none.jsonl must exist"),
        (["--data", "{data}", "--prompts", "math"], "or a set of prompts (chat, maths, code)"),
        (["--data", "{data}", "--samples", "5"], "--samples (5) are counted"),
        (["--data", "{data}", "--held-out", "{data}"], "must not be trained on"),
        (["--data", "{data}", "data.train_files=[x]"], "data.train_files are the files of --data"),
    ],
)
def test_files_that_cannot_be(target, tmp_path, capsys, options, said):
    data = make_chats(tmp_path / "chats.jsonl", 4)
    options = [text.format(data=data) for text in options]
    output = ["--output", str(tmp_path / "run.yaml")]
    assert main(["plan", "--target", str(target), *output, *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_file_that_is_there_is_not_replaced_unasked(target, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("mine")
    assert main(["plan", "--target", str(target), "--data", "chats.jsonl"]) == 2
    assert "run.yaml is there already" in capsys.readouterr().err
