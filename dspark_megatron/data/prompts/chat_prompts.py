"""Chats that end where an answer is wanted."""

from pathlib import Path
from typing import NamedTuple

from dspark_megatron.data.chats.messages import (
    Chat,
    checked_messages,
    system_turn,
    template_options,
)
from dspark_megatron.data.chats.spellings import in_first_spelling
from dspark_megatron.data.chats.template import ChatTemplate
from dspark_megatron.data.files.bad_lines import BadLines
from dspark_megatron.data.files.forms import lines_of
from dspark_megatron.data.files.jsonl import parse_line
from dspark_megatron.data.prompts.response_file import json_line
from dspark_megatron.errors import ConfigError, require


class Prompt(NamedTuple):
    record: dict
    """The input line, its chat cut back to the turn that is to be answered."""
    input_ids: list[int]
    """The chat in the target's format, up to where the answer begins."""


def read_prompts(path: Path, template: ChatTemplate | None) -> list[Prompt]:
    """The prompts of a JSONL file, without ids if a server applies the template; ConfigError,
    naming each `file:line`, for lines that are none."""
    prompts, bad_lines = [], BadLines()
    for number, line in lines_of(path):
        with bad_lines.at(path, number):
            prompts.append(make_prompt(parse_line(line), template))
    bad_lines.check(len(prompts) + len(bad_lines), None)
    require(bool(prompts), f"{path} must hold at least one prompt and has no lines")
    return prompts


def make_prompt(record: dict, template: ChatTemplate | None) -> Prompt:
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
        return Prompt(record, [])
    text = in_first_spelling(Chat(system + messages, options), template.render_prompt)
    return Prompt(record, template.tokenize(text)[0])
