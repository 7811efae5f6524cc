"""Prompts: chats that end where an answer is wanted."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.chats.messages import (
    Chat,
    chat_messages,
    checked_messages,
    system_turn,
    template_options,
)
from dspark_megatron.data.chats.spellings import in_first_spelling
from dspark_megatron.data.chats.template import ChatTemplate
from dspark_megatron.data.files.bad_lines import BadLines
from dspark_megatron.data.files.jsonl import parse_line
from dspark_megatron.data.files.reading import read_lines
from dspark_megatron.data.files.sources import DataFile
from dspark_megatron.data.prompts.prompt_sets import find_prompts
from dspark_megatron.data.prompts.response_file import json_line
from dspark_megatron.errors import ConfigError, require


class Prompt(NamedTuple):
    """A chat up to where the assistant begins to write."""

    input_ids: list[int]
    text: str
    """The rendered chat that the ids encode."""
    record: dict | None = None
    """The line to be answered, its chat cut back to the turn that wants an answer."""


def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_prompts: int | None,
    max_prompt_length: int,
    rules: AnswerRules | None = None,
) -> list[Prompt]:
    """The first `max_prompts` (None: all) prompts of an evaluation's file, of what else an entry of
    data files may be, or of a set that comes with the package.

    A line has `messages` (an assistant turn at the end is dropped), `turns` (strings, of which the
    first is used) or `prompt` (a string), looked for in this order. Raises ConfigError, naming each
    `file:line`, for malformed lines and prompts of more than `max_prompt_length` tokens, and for a
    file without prompts.
    """
    template = ChatTemplate(tokenizer, rules=rules)

    def prompt(record: dict) -> Prompt:
        chat = Chat(_messages_to_answer(record), template_options(record))
        input_ids, text = _encode(chat, template)
        require(
            len(input_ids) <= max_prompt_length,
            f"the prompt has {len(input_ids)} tokens, more than evaluate.max_prompt_length "
            f"({max_prompt_length}); raise it or remove the line",
        )
        return Prompt(input_ids, text)

    return _read(path, prompt, max_prompts)


def read_prompts(path: str | Path, template: ChatTemplate | None) -> list[Prompt]:
    """The prompts of a file to be answered, without ids and text if a server applies the template.
    Raises ConfigError, naming each `file:line`, for lines that are none."""
    return _read(path, lambda record: make_prompt(record, template))


def _read(path: str | Path, use: Callable[[dict], Prompt], most: int | None = None) -> list[Prompt]:
    prompts, bad_lines = [], BadLines()
    for file, number, line in islice(_lines(find_prompts(path)), most):
        with bad_lines.at(file.path, number):
            prompts.append(use(parse_line(line)))
    bad_lines.check(len(prompts) + len(bad_lines), None)
    require(bool(prompts), f"{path} must hold at least one prompt and has no lines")
    return prompts


def _lines(files: list[DataFile]) -> Iterator[tuple[DataFile, int, object]]:
    for file in files:
        require(
            not file.indexed, f"{file.path} is an indexed dataset of ids, and prompts are texts"
        )
        yield from ((file, number, line) for number, line in read_lines(file))


def _encode(chat: Chat, template: ChatTemplate) -> tuple[list[int], str]:
    text = in_first_spelling(chat, template.render_prompt)
    return template.tokenize(text)[0], text


def make_prompt(record: dict, template: ChatTemplate | None) -> Prompt:
    """The prompt of a line whose `messages` end with a question, or with an answer to it that is to
    be replaced."""
    messages = checked_messages(record.get("messages"))
    system, written = system_turn(record), record["messages"]
    record = {key: value for key, value in record.items() if key != "system"}
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    require(
        bool(messages) and messages[-1]["role"] in ("user", "tool"),
        "the chat must end with a user turn or a tool's (an answer may follow it)",
    )
    # As they were written, but for the names of roles: a server wants arguments of calls as text.
    pairs = zip(written, messages, strict=False)
    asked = [{**message, "role": known["role"]} for message, known in pairs]
    record = {**record, "messages": system + asked}
    options = template_options(record)
    try:
        json_line(record)  # better known now than when the output is written
    except UnicodeEncodeError as error:
        raise ConfigError(f"the line is not valid Unicode: {error}") from error
    if template is None:
        return Prompt([], "", record)
    return Prompt(*_encode(Chat(system + messages, options), template), record)


def _messages_to_answer(record: dict) -> list[dict]:
    """The chat of an evaluation's line, ending with a turn to be answered."""
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
