"""A line of a file as a chat, its messages in one spelling.

Servers, exporters and data sets spell the same turn differently. A chat template that meets a
spelling it does not know leaves text out or prints Python's own form of it. So all spellings become
one here, before any template sees them. `spellings.py` has those that some templates want instead.
"""

import json
from typing import Any, NamedTuple

from dspark_megatron.errors import ConfigError, require

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatbot", "model"), "assistant"),
    **{"system": "system", "developer": "developer"},
    **dict.fromkeys(("tool", "function", "ipython", "observation"), "tool"),
}
"""Values of `role` or `from`, in any case, and the role that templates know them by."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Where servers put the reasoning of an answer. The first is ours."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that are text."""
NOT_OPTIONS = {
    *("chat_template", "conversation", "continue_final_message", "tokenizer_kwargs"),
    *("padding", "truncation", "max_length", "return_tensors"),
}
"""What a line may not set beside its options of the template: another template, and how texts
become tokens."""
MOST_MESSAGES = 2000
"""Of one chat: it is rendered anew for each of its answers."""
LOSS_SWITCHES = ("weight", "loss", "train", "training")
"""Where files for other trainers say which turns are learnt."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values of a key that say no more than its absence."""


class Chat(NamedTuple):
    messages: list[dict]
    template_options: dict[str, Any]
    """What the chat template is given besides the messages."""
    given: int = 0
    """Messages at the start that are not learnt, whoever wrote them."""
    cut_short: bool = False
    """Whether the last answer was cut, so that it has no end of its own."""


def chat_of(record: dict) -> Chat:
    """The chat of a line with `messages`, `conversations`, or `prompt` and `completion` that are
    lists of messages. Raises ConfigError for a malformed one."""
    if "messages" in record or "conversations" in record:
        messages = chat_messages(record)
        given = _opening_turns(messages)
    else:
        prompt = checked_messages(record["prompt"], name="prompt")
        messages = prompt + checked_messages(record["completion"], name="completion")
        given = len(prompt)
    return Chat(messages, template_options(record), given, is_cut_short(record))


def _opening_turns(messages: list[dict]) -> int:
    """How many messages come before the first question, if the assistant speaks among them: a
    greeting that no target was asked for. Without any question it answers the system text."""
    speakers = [message["role"] for message in messages]
    for position, speaker in enumerate(speakers):
        if speaker not in ("system", "developer", "assistant"):
            return position if "assistant" in speakers[:position] else 0
    return int(speakers[0] == "assistant")


def is_cut_short(record: dict) -> bool:
    """Whether the line says that its last answer ran into a limit."""
    return record.get("finish_reason") == "length"


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
    others = sorted(NOT_OPTIONS.intersection(options))
    require(
        not others,
        f'"chat_template_kwargs" gives {", ".join(others)}, which is no option of a template; '
        "take it out",
    )
    tools = record.get("tools") or record.get("functions") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ConfigError(f'"tools" must be a list or the JSON text of one: {error}') from error
    require(isinstance(tools, list), f'"tools" must be a list, not {shown(tools)}')
    return {**options, **({"tools": tools} if tools else {})}


def check_learnt(position: int, message: dict) -> None:
    """ConfigError for an assistant's turn that would be learnt although it says that it is not."""
    off = [
        f"{key}: {message[key]}" for key in LOSS_SWITCHES if message.get(key, True) not in (True, 1)
    ]
    require(
        not off or message["role"] != "assistant",
        f"message {position} (assistant) has {', '.join(off)}, and every turn of the assistant is "
        'learnt; give the turns before the first to be learnt as "prompt" and the rest as '
        '"completion", or lines with input_ids and loss_mask',
    )


def checked_messages(messages: Any, name: str = "messages") -> list[dict]:
    """The messages in our spelling. ConfigError unless they are a list of at least one message."""
    require(
        isinstance(messages, list) and bool(messages),
        f'"{name}" must be a list of at least one message, not {shown(messages)}',
    )
    require(
        len(messages) <= MOST_MESSAGES,
        f'"{name}" has {len(messages):,} messages, and at most {MOST_MESSAGES:,} are read',
    )
    return [_normalized(position, message) for position, message in enumerate(messages)]


def _normalized(position: int, message: Any) -> dict:
    """A message with a `role`, a `content` that is a string, and all else that is not empty.
    Reasoning stands under `reasoning_content`, calls under `tool_calls` with objects as arguments.
    ConfigError for what cannot be brought into this form."""
    require(
        isinstance(message, dict) and isinstance(message.get("role"), str),
        f'message {position} must be an object with a string "role", not {shown(message)}',
    )
    role = ROLES.get(message["role"].lower(), message["role"])
    who = f"message {position} ({role})"
    replaced = ("role", "content", "tool_calls", "function_call", *REASONING_KEYS)
    rest = {k: v for k, v in message.items() if k not in replaced and v not in EMPTY}
    if reasoning := _reasoning(who, message):
        rest[REASONING_KEYS[0]] = reasoning
    if calls := _tool_calls(who, message):
        rest["tool_calls"] = calls
    content = message.get("content")
    if content is None and (calls or reasoning):
        content = ""
    return {"role": role, "content": _text(who, content), **rest}


def _text(who: str, content: Any) -> str:
    """A string, or the text that a list of parts is together."""
    require(
        isinstance(content, str | list),
        f'{who} must have a "content" that is a string or a list of parts, not {shown(content)}',
    )
    if isinstance(content, str):
        return content
    return "".join(_text_of_part(who, part) for part in content)


def _text_of_part(who: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    require(
        kind in TEXT_PARTS and isinstance(part.get("text"), str),
        f"{who} has a part that is no text, and the target is trained on text only: {shown(part)}",
    )
    return part["text"]


def _reasoning(who: str, message: dict) -> str:
    """The reasoning of a message, or "". Some servers send the same text under two names."""
    given = {k: message[k] for k in REASONING_KEYS if message.get(k) not in EMPTY}
    for key, text in given.items():
        require(
            isinstance(text, str), f'{who} must have a "{key}" that is a string, not {shown(text)}'
        )
    texts = {text for text in given.values() if text.strip()}
    require(
        len(texts) < 2,
        f"{who} has different texts as {' and '.join(REASONING_KEYS)}; keep the one that is meant",
    )
    return "".join(texts)


def _tool_calls(who: str, message: dict) -> list[dict]:
    """The calls of a message, also a `function_call`, as OpenAI once named a call."""
    calls = message.get("tool_calls") or []
    require(
        isinstance(calls, list), f'{who} must have "tool_calls" that are a list, not {shown(calls)}'
    )
    if message.get("function_call"):
        require(not calls, f"{who} has tool_calls and a function_call; keep one of them")
        calls = [{"type": "function", "function": message["function_call"]}]
    return [_with_object_arguments(who, call) for call in calls]


def _with_object_arguments(who: str, call: Any) -> dict:
    """A tool call whose `function.arguments` may be JSON text, as OpenAI's are."""
    function: Any = call.get("function") if isinstance(call, dict) else None
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
