"""Other spellings of a chat, for templates that want them.

Templates disagree on what they read: the text of a message or its parts, the key of reasoning, the
role `developer`, a call's arguments as an object or as JSON text, tools with or without a wrapping.
Which spelling a template wants shows in what it renders: it is the first that is rendered whole.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial, reduce
from itertools import product
from typing import TypeVar

from dspark_megatron.data.chats.completeness import NotRendered
from dspark_megatron.data.chats.messages import REASONING_KEYS, Chat
from dspark_megatron.errors import ConfigError

Step = Callable[[Chat], Chat]
Result = TypeVar("Result")


def in_first_spelling(chat: Chat, use: Callable[[Chat], Result]) -> Result:
    """What `use` makes of the first spelling that it does not refuse with a ConfigError. If it
    refuses all, the error of the spelling of which most was rendered is raised."""
    errors = []
    for spelled in spellings(chat):
        try:
            return use(spelled)
        except ConfigError as error:
            errors.append(error)
    raise max(errors, key=lambda e: e.found if isinstance(e, NotRendered) else math.inf)


def spellings(chat: Chat) -> Iterator[Chat]:
    """The chat as messages.py has it, then all combinations of what else templates may read."""
    seen: list[Chat] = []
    for steps in product(ROLES, TOOLS, ARGUMENTS, REASONING, CONTENT):
        spelled = reduce(lambda chat, step: step(chat), steps, chat)
        if spelled not in seen:
            seen.append(spelled)
            yield spelled


def _as_it_is(chat: Chat) -> Chat:
    return chat


def _each(change: Callable[[dict], dict]) -> Step:
    """Changes every message."""
    return lambda chat: chat._replace(messages=[change(message) for message in chat.messages])


def developer_as_system(message: dict) -> dict:
    """`developer` under its older name."""
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _content_as_parts(message: dict) -> dict:
    content = message["content"]
    if not content or isinstance(content, list):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _reasoning_as(key: str, message: dict) -> dict:
    return {key if k == REASONING_KEYS[0] else k: v for k, v in message.items()}


def _reasoning_as_part(message: dict) -> dict:
    if REASONING_KEYS[0] not in message:
        return message
    rest = {k: v for k, v in message.items() if k != REASONING_KEYS[0]}
    thinking = {"type": "thinking", "thinking": message[REASONING_KEYS[0]]}
    text = [{"type": "text", "text": message["content"]}] if message["content"] else []
    return {**rest, "content": [thinking, *text]}


def _arguments_as_text(message: dict) -> dict:
    if "tool_calls" not in message:
        return message
    calls = [{**call, "function": _with_text(call["function"])} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _with_text(function: dict) -> dict:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _tools_wrapped(chat: Chat) -> Chat:
    if "tools" not in chat.template_options:
        return chat
    tools = [
        {"type": "function", "function": tool}
        if isinstance(tool, dict) and "name" in tool and "function" not in tool
        else tool
        for tool in chat.template_options["tools"]
    ]
    return chat._replace(template_options={**chat.template_options, "tools": tools})


ROLES = (_as_it_is, _each(developer_as_system))
CONTENT = (_as_it_is, _each(_content_as_parts))
REASONING = (
    _as_it_is,
    *(_each(partial(_reasoning_as, key)) for key in REASONING_KEYS[1:]),
    _each(_reasoning_as_part),
)
ARGUMENTS = (_as_it_is, _each(_arguments_as_text))
TOOLS = (_as_it_is, _tools_wrapped)
