"""Whether a template's text has all that the chat says.

A template may leave out a message of a role that it does not know, reasoning, tool calls or the
tools themselves, without an error. The draft would then learn answers to questions that nobody
asked.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from dspark_megatron.data.chats.messages import shown
from dspark_megatron.data.chats.reasoning import texts_and_reasoning
from dspark_megatron.errors import ConfigError

REASONING_TAGS = re.compile(
    r"</?(?:[a-z]+:)?think(?:ing)?>|\[/?THINK\]|<\|(?:START|END)_THINKING\|>|<\|?channel\|?>"
    r"|<\|inner_(?:prefix|suffix)\|>|◁/?think▷"
)
"""What families of models write around their reasoning. A template may set such a tag, or the white
space beside it, as its own model does."""


class NotRendered(ConfigError):
    """The chat template fails on the chat.

    `found`: how many of the chat's statements were seen in the text before that.
    """

    def __init__(self, message: str, found: int = -1) -> None:
        super().__init__(message)
        self.found = found


class LeftOut(NotRendered):
    """The chat template leaves something out that the chat says."""

    def __init__(self, what: str, text: str, found: int) -> None:
        super().__init__(
            f"the chat template leaves out {what}: {shown(text)} must stand in what it makes of "
            "the chat; change the line or the template",
            found,
        )


def check_complete(
    text: str, messages: list[dict], options: dict[str, Any], *, answers: range
) -> None:
    """LeftOut, naming what was left out, unless the text has what each message says, in the order
    of the messages, and the tools.

    `answers`: messages whose reasoning must be there, too. Templates may drop that of earlier
    turns. System texts may stand anywhere: some templates put them before the last question.
    """
    for message in messages:
        _check_no_data(text, message)
    position, count = 0, 0
    for number, message in enumerate(messages):
        who = f"message {number} ({message['role']})"
        ends = [position]
        for what, spellings in _statements(message, with_reasoning=number in answers):
            found = ((text.find(spelled, position), len(spelled)) for spelled in spellings)
            end = min((start + length for start, length in found if start >= 0), default=None)
            if end is None:
                raise LeftOut(f"{what} of {who}", spellings[0], count)
            ends.append(end)
            count += 1
        if message["role"] not in ("system", "developer"):
            position = max(ends)
    for spellings in _statements_of_tools(options.get("tools", [])):
        if not any(spelled in text for spelled in spellings):
            raise LeftOut("the line's tools", spellings[0], count)


def _check_no_data(text: str, message: dict) -> None:
    """A template that wants text prints data as Python writes it, or as JSON."""
    for call in message.get("tool_calls", []):
        arguments = call["function"]["arguments"]
        data = arguments if isinstance(arguments, dict) else call["function"]
        for value in _containers(data):
            as_json = [json.dumps(value, ensure_ascii=ascii_only) for ascii_only in (False, True)]
            if repr(value) in text and repr(value) not in as_json:
                raise NotRendered(
                    f"the chat template prints a call as Python does: {shown(value)}; change the "
                    "template"
                )
    for part in message["content"] if isinstance(message["content"], list) else []:
        key = part["type"]
        plain = re.split(r"['\"\\]|[^ -~]", part[key].strip(), maxsplit=1)[0]
        if re.search(rf"""['"]{key}['"]: *['"]\s*{re.escape(plain)}""", text):
            raise NotRendered(
                f"the chat template prints parts as data, not their text: {shown(part)}; "
                "change the template"
            )


def _containers(value: object) -> Iterator[dict | list]:
    """All dicts and lists in a value, itself included, that Python and JSON may write
    differently."""
    if isinstance(value, dict | list) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def _statements(message: dict, *, with_reasoning: bool) -> Iterator[tuple[str, list[str]]]:
    """What a message says: for each statement its kind, and the spellings of it that a template
    may choose from."""
    texts, reasoning = texts_and_reasoning(message)
    if reasoning and with_reasoning:
        yield "the reasoning", _spelled(reasoning)
    parts = ["".join(texts)]
    if message["role"] == "assistant":
        parts = REASONING_TAGS.split(parts[0])
    for part in parts if with_reasoning else parts[-1:]:
        if part.strip():
            yield "the text", _spelled(part)
    if isinstance(message.get("refusal"), str):
        yield "the refusal", _spelled(message["refusal"])
    for call in message.get("tool_calls", []):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        yield "a call", [name]
        # Text is JSON already: JSON of it would be another text.
        for spellings in [[arguments]] if isinstance(arguments, str) else _leaves(arguments):
            yield f"the call of {name}", spellings


def _spelled(text: str) -> list[str]:
    """A text as it is or inside JSON. Templates may trim it."""
    text = text.strip()
    inside = [json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)]
    return list(dict.fromkeys([text, *inside]))


def _leaves(value: object) -> Iterator[list[str]]:
    """The spellings of each key and each value in data."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield _spelled(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield _spelled(value)
    else:
        yield [json.dumps(value), str(value)]


def _statements_of_tools(tools: list) -> Iterator[list[str]]:
    """What a template must say of tools: their names, descriptions and the names of parameters. Of
    a tool in another form it must say all."""
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            yield from _leaves(function)
            continue
        yield [function["name"]]
        yield from _leaves(function.get("description", ""))
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        if isinstance(properties, dict):
            yield from map(_spelled, properties)
