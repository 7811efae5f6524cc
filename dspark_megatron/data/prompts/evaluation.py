"""Prompts of an evaluation, ready for the target to answer."""

from itertools import islice
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.chats.messages import Chat, chat_messages, template_options
from dspark_megatron.data.chats.spellings import in_first_spelling
from dspark_megatron.data.chats.template import ChatTemplate
from dspark_megatron.data.files.bad_lines import BadLines
from dspark_megatron.data.files.forms import lines_of
from dspark_megatron.data.files.jsonl import parse_line
from dspark_megatron.errors import ConfigError, require


class Prompt(NamedTuple):
    """A chat up to where the assistant begins to write."""

    input_ids: list[int]
    text: str
    """The rendered chat that the ids encode."""


def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_prompts: int | None,
    max_prompt_length: int,
    rules: AnswerRules | None = None,
) -> list[Prompt]:
    """The first `max_prompts` (null: all) prompts of a JSONL file, through the chat template.

    A line has `messages` (an assistant turn at the end is dropped), `turns` (strings; the first is
    used) or `prompt` (a string), looked for in this order. Raises ConfigError, naming each
    `file:line`, for malformed lines and prompts of more than `max_prompt_length` tokens; and for a
    file without prompts.
    """
    template, bad_lines = ChatTemplate(tokenizer, rules=rules), BadLines()
    prompts, lines = [], 0
    for number, line in islice(lines_of(path), max_prompts):
        lines += 1
        with bad_lines.at(path, number):
            prompts.append(_prompt(parse_line(line), template, max_prompt_length))
    bad_lines.check(lines, None)
    require(bool(prompts), f"{path} must hold at least one prompt and has no lines")
    return prompts


def _prompt(record: dict, template: ChatTemplate, max_length: int) -> Prompt:
    chat = Chat(_prompt_messages(record), template_options(record))
    text = in_first_spelling(chat, template.render_prompt)
    input_ids, _ = template.tokenize(text)
    require(
        len(input_ids) <= max_length,
        f"the prompt has {len(input_ids)} tokens, more than evaluate.max_prompt_length "
        f"({max_length}); raise it or remove the line",
    )
    return Prompt(input_ids, text)


def _prompt_messages(record: dict) -> list[dict]:
    """The chat of a line, ending with a turn to be answered."""
    if "messages" in record:
        messages = chat_messages(record)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        require(
            bool(messages) and messages[-1]["role"] != "assistant",
            "the chat must have a turn to be answered before the assistant turn at its end",
        )
        return messages
    if "turns" in record:
        turns = record["turns"]
        require(
            isinstance(turns, list) and bool(turns) and isinstance(turns[0], str),
            '"turns" must be a list of at least one string',
        )
        return [{"role": "user", "content": turns[0]}]
    if "prompt" in record:
        require(isinstance(record["prompt"], str), '"prompt" must be a string')
        return [{"role": "user", "content": record["prompt"]}]
    raise ConfigError(
        f'a line must have "messages", "turns" or "prompt"; it has the keys {sorted(record)}'
    )
