"""One spelling of a message, whatever wrote it: roles, empty keys, parts, tool calls.

Servers, exporters and data sets spell the same turn differently; a chat template that meets a
spelling it does not know leaves text out or prints Python's own. So all become one here, before any
template sees them; where a template wants another one, `spellings.py` has it.
"""

import json

from dspark_megatron.errors import ConfigError, require

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
}
"""Who speaks, beside `role` or `from` and in any case, and the role that templates know them by."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Where servers put the reasoning of an answer; the first is ours."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of parts that are text."""

LOSS_SWITCHES = ("weight", "loss", "train", "training")
"""Where other trainers' files say which turns are learnt."""


def normalized(position: int, message: object, name: str = "message") -> dict:
    """A message with a `role`, a `content` that is a string, and of all else what is not empty;
    `reasoning_content` and `tool_calls` stand under these names, arguments of calls as objects.
    ConfigError for what cannot be brought into this form."""
    require(
        isinstance(message, dict) and isinstance(message.get("role"), str),
        f'{name} {position} must be an object with a string "role", not {shown(message)}',
    )
    role = ROLES.get(message["role"].lower(), message["role"])
    who = f"{name} {position} ({role})"
    rest = {key: value for key, value in message.items() if not _is_empty(value)}
    for key in ("role", "content", "tool_calls", "function_call"):
        rest.pop(key, None)
    rest = _with_one_reasoning(who, rest)
    if calls := _tool_calls(who, message):
        rest["tool_calls"] = calls
    content = message.get("content")
    if content is None and ("tool_calls" in rest or REASONING_KEYS[0] in rest):
        content = ""
    return {"role": role, "content": _text(who, content), **rest}


def check_learnt(position: int, message: dict) -> None:
    """ConfigError for an assistant's turn to be learnt that says it is not."""
    off = [
        f"{key}: {message[key]}" for key in LOSS_SWITCHES if message.get(key, True) not in (True, 1)
    ]
    require(
        not off or message["role"] != "assistant",
        f"message {position} (assistant) has {', '.join(off)}, and every turn of the assistant is "
        'learnt; give the turns before the first to be learnt as "prompt" and the rest as '
        '"completion", or lines with input_ids and loss_mask',
    )


def _is_empty(value: object) -> bool:
    return value is None or value in ("", [], {})


def _text(who: str, content: object) -> str:
    """Parts of text become the text that they are together."""
    require(
        isinstance(content, str | list),
        f'{who} must have a "content" that is a string or a list of parts, not {shown(content)}',
    )
    if isinstance(content, str):
        return content
    return "".join(_text_of_part(who, part) for part in content)


def _text_of_part(who: str, part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    require(
        kind in TEXT_PARTS and isinstance(part.get("text"), str),
        f"{who} has a part that is no text, and the target is trained on text only: {shown(part)}",
    )
    return part["text"]


def _with_one_reasoning(who: str, rest: dict) -> dict:
    """Some servers send the same reasoning under two names."""
    texts = [rest.pop(key) for key in REASONING_KEYS if isinstance(rest.get(key), str)]
    texts = [text for text in texts if text.strip()]
    require(
        len(set(texts)) < 2,
        f"{who} has different texts as {' and '.join(REASONING_KEYS)}; keep the one that is meant",
    )
    return {**rest, REASONING_KEYS[0]: texts[0]} if texts else rest


def _tool_calls(who: str, message: dict) -> list[dict]:
    """Also a `function_call`, as OpenAI once named a call."""
    calls = message.get("tool_calls") or []
    require(
        isinstance(calls, list), f'{who} must have "tool_calls" that are a list, not {shown(calls)}'
    )
    if message.get("function_call"):
        require(not calls, f"{who} has tool_calls and a function_call; keep one of them")
        calls = [{"type": "function", "function": message["function_call"]}]
    return [_with_object_arguments(who, call) for call in calls]


def _with_object_arguments(who: str, call: object) -> dict:
    """A tool call whose `function.arguments` may be JSON text, as OpenAI's are."""
    function = call.get("function") if isinstance(call, dict) else None
    require(
        isinstance(function, dict) and isinstance(function.get("name"), str),
        f'{who} has a tool call without a "function" with a "name": {shown(call)}',
    )
    arguments = function.get("arguments") or {}
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ConfigError(
            f"{who} calls {function['name']} with arguments that are no JSON object: "
            f"{shown(arguments)}"
        )
    return {**call, "function": {**function, "arguments": parsed}}


def shown(value: object) -> str:
    """A value for an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
