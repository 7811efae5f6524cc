"""Prompts of an evaluation: their forms, and lines that are refused."""

from pathlib import Path

import pytest

from dspark_megatron.data.prompts.chat_prompts import load_prompts
from dspark_megatron.errors import ConfigError
from support.chat_lines import chat, write_jsonl


def test_the_three_forms_of_a_prompt(tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "prompts.jsonl",
        [chat("hi"), chat("hi", "hello"), {"turns": ["hi", "more"]}, {"prompt": "hi"}],
    )
    prompts = load_prompts(path, tokenizer, max_prompts=None, max_prompt_length=64)
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert [prompt.text for prompt in prompts] == [text] * 4
    assert all(tokenizer.decode(prompt.input_ids) == text for prompt in prompts)
    assert len(load_prompts(path, tokenizer, max_prompts=3, max_prompt_length=64)) == 3


def test_a_prompt_keeps_earlier_turns(tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "prompts.jsonl", [chat("<kind", "hi", "hello", "and?", "no")])
    [prompt] = load_prompts(path, tokenizer, None, 99)
    assert prompt.text.endswith(
        "hello<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "hi"}, r'"messages", "turns" or "prompt".*question'),
        ({"prompt": 3}, '"prompt" must be a string'),
        ({"turns": []}, '"turns" must be a list'),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "a turn to be answered"),
        ({"messages": [{"role": "user"}]}, 'message 0 .* "content"'),
        ({"prompt": "x" * 99}, r"more than evaluate.max_prompt_length \(64\)"),
    ],
)
def test_a_bad_prompt_is_named(tokenizer, tmp_path: Path, record: dict, message: str) -> None:
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "hi"}, record])
    with pytest.raises(ConfigError, match=f"prompts.jsonl:2: .*{message}"):
        load_prompts(path, tokenizer, None, 64)


def test_an_empty_prompt_file(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="prompts.jsonl must hold at least one prompt"):
        load_prompts(path, tokenizer, None, 64)
