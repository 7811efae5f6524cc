"""The forms in which a chat is written, as one: messages with a role and a content."""

import json
from typing import Any, NamedTuple

from dspark_megatron.config import ConfigError, require

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Who speaks in a ShareGPT turn, and the role that chat templates know them by."""


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
    given = 0
    if "messages" in record:
        messages = checked_messages(record["messages"])
    elif "conversations" in record:
        messages = sharegpt_messages(record)
    else:
        prompt = checked_messages(record["prompt"], name="prompt")
        messages = prompt + checked_messages(record["completion"], name="completion")
        given = len(prompt)
    return Chat(messages, template_options(record), given, is_cut_short(record))


def is_cut_short(record: dict) -> bool:
    """Whether the line says that its last answer ran into a limit."""
    return record.get("finish_reason") == "length"


def checked_messages(messages: object, name: str = "messages") -> list[dict]:
    """The messages, if they are a chat: a non-empty list of objects, each with a string `role`
    and a `content` that is a string or a list of parts; a turn of nothing but `tool_calls` gets an
    empty one. Arguments of tool calls become objects, as serving engines hand them to templates.
    ConfigError otherwise."""
    require(
        isinstance(messages, list) and bool(messages),
        f'"{name}" must be a list of at least one message, not {shown(messages)}',
    )
    return [_checked_message(position, message) for position, message in enumerate(messages)]


def _checked_message(position: int, message: object) -> dict:
    require(
        isinstance(message, dict) and isinstance(message.get("role"), str),
        f'message {position} must be an object with a string "role", not {shown(message)}',
    )
    if message.get("tool_calls"):
        require(
            isinstance(message["tool_calls"], list),
            f'message {position} must have "tool_calls" that are a list, not '
            f"{shown(message['tool_calls'])}",
        )
        calls = [_with_object_arguments(position, call) for call in message["tool_calls"]]
        message = {**message, "content": message.get("content") or "", "tool_calls": calls}
    require(
        isinstance(message.get("content"), str | list),
        f'message {position} ({message["role"]}) must have a "content" that is a string '
        f"or a list of parts, not {shown(message.get('content'))}",
    )
    return message


def _with_object_arguments(position: int, call: object) -> dict:
    """A tool call whose `function.arguments` may be JSON text, as OpenAI's are."""
    function = call.get("function") if isinstance(call, dict) else None
    require(
        isinstance(function, dict) and isinstance(function.get("name"), str),
        f'message {position} has a tool call without a "function" with a "name": {shown(call)}',
    )
    arguments = function.get("arguments", {})
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        parsed = None
    require(
        isinstance(parsed, dict),
        f"message {position} calls {function['name']} with arguments that are no JSON object: "
        f"{shown(arguments)}",
    )
    return {**call, "function": {**function, "arguments": parsed}}


def sharegpt_messages(record: dict) -> list[dict]:
    """`conversations` of `from` and `value` (or of `role` and `content`), after the line's
    `system` text if it has one."""
    turns = record["conversations"]
    require(
        isinstance(turns, list) and bool(turns),
        f'"conversations" must be a list of at least one turn, not {shown(turns)}',
    )
    messages = [_message_of_turn(position, turn) for position, turn in enumerate(turns)]
    system = record.get("system")
    require(
        system is None or isinstance(system, str),
        f'"system" must be a string, not {shown(system)}',
    )
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    return checked_messages(messages, name="conversations")


def _message_of_turn(position: int, turn: object) -> object:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn  # a message, or refused as one
    speaker, value = turn["from"], turn.get("value")
    require(
        isinstance(speaker, str) and speaker in SPEAKERS,
        f'turn {position} is "from" {shown(speaker)}, which must be one of {", ".join(SPEAKERS)}',
    )
    require(
        isinstance(value, str),
        f'turn {position} ({speaker}) must have a "value" that is a string, not {shown(value)}',
    )
    return {"role": SPEAKERS[speaker], "content": value}


def template_options(record: dict) -> dict[str, Any]:
    """`tools` (a list, or the JSON text of one) and `chat_template_kwargs` of a line, as keyword
    arguments of the chat template."""
    options = record.get("chat_template_kwargs") or {}
    require(
        isinstance(options, dict),
        f'"chat_template_kwargs" must be an object, not {shown(options)}',
    )
    tools = record.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ConfigError(f'"tools" must be a list or the JSON text of one: {error}') from error
    require(isinstance(tools, list), f'"tools" must be a list, not {shown(tools)}')
    return {**options, **({"tools": tools} if tools else {})}


def shown(value: object) -> str:
    """A value for an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
