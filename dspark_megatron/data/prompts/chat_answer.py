"""What a server says to a chat, as an answer to learn from, or as the reason why it is none."""

from typing import Any

from dspark_megatron.data.prompts.json_server import JsonServer, NoAnswer
from dspark_megatron.data.prompts.response_file import Answer, json_line

WHOLE = ("stop", "length", "tool_calls")
"""Finish reasons of answers that can be learnt from."""
_DEEPEST_CALL, _LONG_KEY = 32, 16


def answer_of(response: dict[str, Any], server: JsonServer, *, wants_tokens: bool) -> Answer:
    """Raises NoAnswer for a response without a whole answer, and for one whose parts are not of
    the types that the protocol gives them."""
    try:
        choice = response["choices"][0]
        message, finish_reason = choice["message"], choice["finish_reason"]
        tokens = (response.get("usage") or {}).get("completion_tokens") or 0
        content = message.get("content")
        # vLLM calls reasoning_content reasoning in newer versions; chat templates do not.
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        calls = message.get("tool_calls")
        prompt_ids, token_ids = response.get("prompt_token_ids"), choice.get("token_ids")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        detail = server.shown(f"{type(error).__name__} {error}")
        raise NoAnswer("malformed answer", detail) from error
    if finish_reason not in WHOLE:
        raise NoAnswer(f"finish_reason {server.shown(str(finish_reason))}", "no whole answer")
    if content is None and not reasoning and not calls:
        raise NoAnswer("no content", f"finish_reason {finish_reason}")
    for name, value in (("content", content), ("reasoning", reasoning)):
        _check(value is None or isinstance(value, str), f"{name} must be text", value)
    _check(_is_number(tokens), "completion_tokens must be a whole number below 2**31", tokens)
    is_list = isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    _check(not calls or is_list, "tool_calls must be a list of objects", calls)
    _check(_is_flat(calls, _DEEPEST_CALL), f"tool_calls go deeper than {_DEEPEST_CALL}", calls)
    for name, ids in (("prompt_token_ids", prompt_ids), ("token_ids", token_ids)):
        _check(ids is None or _are_token_ids(ids), f"{name} must be a list of token ids", ids)
    parts = {"reasoning_content": reasoning, "tool_calls": calls}
    parts = {name: value for name, value in parts.items() if value}
    answer = Answer(content or "", finish_reason, tokens, parts or None, prompt_ids, token_ids)
    if wants_tokens and not answer.sample():
        raise NoAnswer("no token ids", "the server does not tell those of prompt and answer")
    _check_writable(answer, server.api_key)
    return answer


def _check(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise NoAnswer("malformed answer", f"{rule}, not {type(value).__name__}")


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_flat(value: Any, deepest: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return deepest > 0 and all(_is_flat(one, deepest - 1) for one in inner)


def _check_writable(answer: Answer, key: str) -> None:
    """An answer goes into files that are passed on."""
    try:
        line = json_line(answer._asdict())
    except UnicodeEncodeError as error:
        raise NoAnswer("malformed answer", "it is not valid Unicode") from error
    # A short one is a word that answers may hold, such as the EMPTY of servers that want none.
    if len(key) >= _LONG_KEY and key.encode() in line:
        raise NoAnswer("the key in the answer", "the server sends the key back")
