"""Other spellings of a chat, for templates that want them.

Templates disagree on what they read: the text of a message or its parts, the key of reasoning, the
role `developer`, a call's arguments as an object or as JSON text, tools with or without a wrapping.
Which spelling a template wants shows in what it renders: it is the first that is rendered whole.
"""

import json
import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple, TypeVar

from dspark_megatron.data.chats.completeness import NotRendered
from dspark_megatron.data.chats.messages import REASONING_KEYS, Chat
from dspark_megatron.errors import ConfigError

AS_PART = "part"
REASONING = (*REASONING_KEYS, AS_PART)
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


class Spelling(NamedTuple):
    """What a template may want instead of what messages.py writes."""

    developer: str
    """The role `developer`, or its older name."""
    wrapped_tools: bool
    arguments_as_text: bool
    reasoning: str
    """The key of reasoning, or AS_PART for a part of the content."""
    content_as_parts: bool


def spellings(chat: Chat) -> Iterator[Chat]:
    """The chat as messages.py has it, then all combinations of what else templates may read."""
    seen: list[Chat] = []
    either = (False, True)
    for choices in product(("developer", "system"), either, either, REASONING, either):
        spelling = Spelling(*choices)
        messages = [_message(message, spelling) for message in chat.messages]
        options = _options(chat.template_options, spelling)
        spelled = chat._replace(messages=messages, template_options=options)
        if spelled not in seen:
            seen.append(spelled)
            yield spelled


def _message(message: dict, spelling: Spelling) -> dict:
    spelled, thinking = {}, []
    for key, value in message.items():
        if key == "role" and value == "developer":
            value = spelling.developer
        elif key == "tool_calls" and spelling.arguments_as_text:
            value = [_with_text(call) for call in value]
        elif key == REASONING_KEYS[0]:
            if spelling.reasoning == AS_PART:
                thinking = [{"type": "thinking", "thinking": value}]
                continue
            key = spelling.reasoning
        spelled[key] = value
    content = message["content"]
    if thinking or (content and spelling.content_as_parts):
        spelled["content"] = thinking + ([{"type": "text", "text": content}] if content else [])
    return spelled


def _with_text(call: dict) -> dict:
    text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


def _options(options: dict[str, Any], spelling: Spelling) -> dict[str, Any]:
    if not spelling.wrapped_tools or "tools" not in options:
        return options
    tools = [
        {"type": "function", "function": tool}
        if isinstance(tool, dict) and "name" in tool and "function" not in tool
        else tool
        for tool in options["tools"]
    ]
    return {**options, "tools": tools}
