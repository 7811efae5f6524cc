"""The forms in which a chat is written, as one: messages with a role and a content."""

import json
from typing import Any, NamedTuple

from dspark_megatron.data.chats.normalize import ROLES, normalized, shown
from dspark_megatron.errors import ConfigError, require


class Chat(NamedTuple):
    messages: list[dict]
    template_options: dict[str, Any]
    """What the chat template is given beside the messages."""
    given: int = 0
    """Messages at the start that are not learnt, whoever wrote them."""
    cut_short: bool = False
    """The last answer has no end of its own."""


def chat_of(record: dict) -> Chat:
    """The chat of a line with `messages`, `conversations`, or `prompt` and `completion` that are
    lists of messages. ConfigError for one that is malformed."""
    if "messages" in record or "conversations" in record:
        messages = chat_messages(record)
        given = _opening_turns(messages)
    else:
        prompt = checked_messages(record["prompt"], name="prompt")
        messages = prompt + checked_messages(record["completion"], name="completion")
        given = len(prompt)
    return Chat(messages, template_options(record), given, is_cut_short(record))


def _opening_turns(messages: list[dict]) -> int:
    """Messages up to the first that asks for an answer, if the assistant speaks before: a greeting
    that no target was asked for. Without any that asks, an answer to the system text is one."""
    speakers = [message["role"] for message in messages]
    for position, speaker in enumerate(speakers):
        if speaker not in ("system", "developer", "assistant"):
            return position if "assistant" in speakers[:position] else 0
    return int(speakers[0] == "assistant")


def is_cut_short(record: dict) -> bool:
    """Whether the line says that its last answer ran into a limit."""
    return record.get("finish_reason") == "length"


def checked_messages(messages: object, name: str = "messages") -> list[dict]:
    """The messages, if they are a chat: a non-empty list of objects, each in the spelling of
    normalize.py. ConfigError otherwise."""
    require(
        isinstance(messages, list) and bool(messages),
        f'"{name}" must be a list of at least one message, not {shown(messages)}',
    )
    return [normalized(position, message) for position, message in enumerate(messages)]


def chat_messages(record: dict) -> list[dict]:
    """`messages`, or `conversations` of `from` and `value` (or of `role` and `content`), after the
    line's `system` text if it has one."""
    name = "messages" if "messages" in record else "conversations"
    turns = record[name]
    if isinstance(turns, list):
        turns = [_message_of_turn(position, turn) for position, turn in enumerate(turns)]
    return system_turn(record) + checked_messages(turns, name)


def system_turn(record: dict) -> list[dict]:
    """The line's `system` text as a message, if it has one."""
    system = record.get("system")
    require(
        system is None or isinstance(system, str),
        f'"system" must be a string, not {shown(system)}',
    )
    return [{"role": "system", "content": system}] if system else []


def _message_of_turn(position: int, turn: object) -> object:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn  # a message, or refused as one
    speaker, value = turn["from"], turn.get("value")
    require(
        isinstance(speaker, str) and speaker.lower() in ROLES,
        f'turn {position} is "from" {shown(speaker)}, which must be one of {", ".join(ROLES)}',
    )
    require(
        isinstance(value, str),
        f'turn {position} ({speaker}) must have a "value" that is a string, not {shown(value)}',
    )
    others = {key: turn[key] for key in turn if key not in ("from", "value")}
    return {**others, "role": speaker, "content": value}


def template_options(record: dict) -> dict[str, Any]:
    """`tools` (or `functions`: a list, or the JSON text of one) and `chat_template_kwargs` of a
    line, as keyword arguments of the chat template."""
    options = record.get("chat_template_kwargs") or {}
    require(
        isinstance(options, dict),
        f'"chat_template_kwargs" must be an object, not {shown(options)}',
    )
    tools = record.get("tools") or record.get("functions") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ConfigError(f'"tools" must be a list or the JSON text of one: {error}') from error
    require(isinstance(tools, list), f'"tools" must be a list, not {shown(tools)}')
    return {**options, **({"tools": tools} if tools else {})}
