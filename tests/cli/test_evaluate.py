"""What `dspark evaluate` makes of its arguments, before any rank starts."""

import argparse

import pytest

from dspark_megatron.cli.main import parser_of
from dspark_megatron.cli.train.evaluate import sort_arguments
from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import ConfigError


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two runs, an export of the first, and a draft of someone else."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a", "runs/b"):
        folder = tmp_path / name
        (folder / "checkpoints" / "iter_0000010").mkdir(parents=True)
        text = f"target: {{path: target-of-{folder.name}}}\ntrain: {{output_dir: moved}}\n"
        text += "evaluate: {output: old.json, prompt_files: [old.jsonl]}\n"
        (folder / "config.yaml").write_text(text)
    for name in ("runs/a/export", "published"):
        (tmp_path / name).mkdir()
    (tmp_path / "run.yaml").write_text("target: {path: mine}\n")
    return tmp_path


def sorted_arguments(*words):
    args = parser_of("evaluate").parse_intermixed_args(words, argparse.Namespace(words=[]))
    sort_arguments(args)
    return args.drafts, load_config(args.config, args.overrides, trains=False)


def test_a_run_brings_its_settings_and_takes_the_figures(folders):
    drafts, config = sorted_arguments("runs/a", "--prompts", "chat", "x.jsonl")
    assert drafts == ["runs/a"] and config.target.path == "target-of-a"
    assert config.train.output_dir == "runs/a" and config.evaluate.output == "old.json"
    assert config.evaluate.prompt_files == ["chat", "x.jsonl"]


@pytest.mark.parametrize("draft", ["runs/a/export", "runs/a/checkpoints/iter_0000010"])
def test_a_part_of_a_run_brings_its_settings_too(folders, draft):
    drafts, config = sorted_arguments(draft)
    assert drafts == [draft] and config.target.path == "target-of-a"
    assert config.train.output_dir == ""


def test_several_drafts_write_where_it_is_said(folders):
    words = ["published", "runs/b", "runs/a", "--prompts", "chat", "evaluate.temperature=0"]
    drafts, config = sorted_arguments(*words)
    assert drafts == ["published", "runs/b", "runs/a"]
    assert config.target.path == "target-of-b" and config.evaluate.temperature == 0
    assert config.evaluate.output == config.train.output_dir == ""
    _, config = sorted_arguments(*words, "--output", "both.json", "--config", "run.yaml")
    assert config.evaluate.output == "both.json" and config.target.path == "mine"


def test_a_draft_needs_a_target_alone(folders):
    drafts, config = sorted_arguments("published", "--target", "t", "--prompts", "a b.jsonl")
    assert drafts == ["published"] and config.target.path == "t"
    assert config.evaluate.prompt_files == ["a b.jsonl"]


def test_a_config_says_which_draft_it_is(folders):
    for words in (["run.yaml"], ["--config", "run.yaml"]):
        drafts, config = sorted_arguments(*words, "evaluate.checkpoint=x=y")
        assert drafts == [] and config.evaluate.checkpoint == "x=y"
    drafts, config = sorted_arguments("runs/a", "evaluate.untrained=true")
    assert drafts == [] and config.train.output_dir == "runs/a"


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere"], "nowhere must be the folder of a draft or a run"),
        (["run.yaml", "--config", "other.yaml"], "both give the settings"),
        (["runs/a", "runs/b", "runs/a"], "runs/a is named twice"),
        (["runs/a", "runs/b", "evaluate.checkpoint=c"], "chooses one draft, and 2 are named"),
        (["published"], "nothing to evaluate with"),
        ([], "nothing to evaluate with"),
    ],
)
def test_arguments_that_contradict_each_other(folders, words, message):
    with pytest.raises(ConfigError, match=message) as error:
        sorted_arguments(*words)
    assert "\n" not in str(error.value)
