"""The sets of prompts that come with the package, and the names that stand for them."""

import pytest

from dspark_megatron.config import EvaluateConfig
from dspark_megatron.data.prompts.chat_prompts import load_prompts, read_prompts
from dspark_megatron.data.prompts.prompt_sets import SETS
from dspark_megatron.errors import ConfigError
from support.chat_lines import prompt, read_rows, write_jsonl
from support.paths import ROOT


def texts_of(path):
    return [message["content"] for row in read_rows(path) for message in row["messages"]]


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_forty_prompts_within_the_default_length(tokenizer, name):
    prompts = load_prompts(name, tokenizer, None, EvaluateConfig().max_prompt_length)
    assert len(prompts) == len({prompt.text for prompt in prompts}) == 40
    asked = [prompt.record for prompt in read_prompts(name, None)]
    assert asked == read_rows(SETS[name]), "no line needs to be changed to be answered"


def test_no_text_is_in_two_sets_or_in_the_data_of_the_quickstart():
    texts = [text for path in SETS.values() for text in texts_of(path)]
    assert len(texts) == len(set(texts))
    files = list((ROOT / "examples" / "quickstart").rglob("*.jsonl"))
    known = {text for file in files for text in texts_of(file)}
    assert len(known) > 1000 and known.isdisjoint(texts)


def test_some_chats_have_earlier_turns():
    turns = [len(row["messages"]) for row in read_rows(SETS["chat"])]
    assert set(turns) == {1, 3} and turns.count(3) >= 3


def test_every_file_of_the_folder_has_a_name():
    for name, path in SETS.items():
        assert path.stem == name
    assert set(SETS["chat"].parent.iterdir()) == set(SETS.values())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_name_that_is_also_a_file_or_folder_is_refused(tokenizer, monkeypatch, tmp_path, kind):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "chat"
    if kind == "folder":
        own.mkdir()
    write_jsonl(own / "prompts.jsonl" if kind == "folder" else own, [prompt("hello")])
    with pytest.raises(ConfigError, match="write ./chat for the latter") as refused:
        load_prompts("chat", tokenizer, None, 64)
    assert "\n" not in str(refused.value)
    assert len(load_prompts("./chat", tokenizer, None, 64)) == 1
    assert len(load_prompts("maths", tokenizer, None, 4096)) == 40


def test_an_unknown_name_is_told_the_sets(tokenizer):
    with pytest.raises(ConfigError, match="math must exist: .* prompts \\(chat, maths, code\\)"):
        load_prompts("math", tokenizer, None, 64)
