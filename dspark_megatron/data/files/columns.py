"""Which columns of a table are read, and what each value of them is as JSON.

Arrow gives every object of a column all keys that any of them has, without a value (null) where an
object lacks one. Such keys are left out, as a line of JSON would not have them.
"""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from dspark_megatron.data.files.jsonl import MOST_LEVELS, TOO_DEEP, check_bounds
from dspark_megatron.data.files.opening import needed
from dspark_megatron.errors import ConfigError, require

Make = Callable[[Any], Any] | None
"""Makes JSON of a Python value of Arrow. None: it is JSON as it is."""
FORMS = ("messages", "conversations", "prompt", "completion", "turns", "input_ids")
"""A table must have one of these columns."""
SHOWN = 20
"""How many columns are named in an error."""
CHAT, TEXT = "a list of objects", "a text"
WANTED = {
    **dict.fromkeys(("messages", "conversations"), (CHAT,)),
    **dict.fromkeys(("prompt", "completion"), (TEXT, CHAT)),
    "turns": ("a list of texts",),
    "input_ids": ("a list of whole numbers",),
    "loss_mask": ("a list of whole numbers", "a list of booleans"),
    **dict.fromkeys(("system", "finish_reason"), (TEXT,)),
    **dict.fromkeys(("tools", "functions"), (CHAT, "a list of texts", TEXT)),
    "chat_template_kwargs": ("an object",),
}
"""The columns with a meaning, and what they may hold."""
_TEXTS = ("string", "large_string", "string_view")
_LISTS = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
_NUMBERS = ("integer", "floating", "boolean")
_PLURALS = {
    "an object": "objects",
    TEXT: "texts",
    "a whole number": "whole numbers",
    "a boolean": "booleans",
}


def makers(path: object, schema: Any) -> dict[str, Make]:
    """How to make JSON of the columns that are read: those of WANTED, and all of texts, numbers and
    booleans. ConfigError for a table without a form, or with a column of another type.

    schema: a pyarrow.Schema.
    """
    names = schema.names
    twice = sorted(name for name, count in Counter(names).items() if count > 1)[:SHOWN]
    require(not twice, f"{path} has several columns of the name {', '.join(twice)}; rename them")
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN))
    require(
        any(name in FORMS for name in names),
        f"{path} must have a column {', '.join(FORMS[:-1])} or {FORMS[-1]}, and has "
        f"{shown or 'none'}; rename the one that is meant",
    )
    found = {}
    for name in names:
        kind = schema.field(name).type
        if name in WANTED:
            _check(path, name, kind)
        elif not _is(kind, *_TEXTS, *_NUMBERS):
            continue
        found[name] = _maker(f"{path}: {name}", kind)
    return found


def _check(path: object, name: str, kind: Any) -> None:
    wanted = WANTED[name]
    require(
        _is_json(kind) or _describe(kind) in (*wanted, "nothing"),
        f"{path}: the column {name} must be {' or '.join(wanted)}, and is {_shown(kind)}",
    )


def _describe(kind: Any) -> str:
    """A type in the words of WANTED."""
    if _is(kind, *_LISTS):
        item = _describe(kind.value_type)
        return item if item == "nothing" else f"a list of {_PLURALS.get(item, 'something else')}"
    if _is(kind, *_TEXTS) or (_is(kind, "dictionary") and _is(kind.value_type, *_TEXTS)):
        return TEXT
    if _is(kind, "struct") or _is_json(kind):
        return "an object"
    names = {"null": "nothing", "integer": "a whole number", "boolean": "a boolean"}
    return next((word for name, word in names.items() if _is(kind, name)), "something else")


def _maker(where: str, kind: Any, level: int = 1) -> Make:
    """ConfigError for a type that JSON does not have."""
    require(level <= MOST_LEVELS, f"{where}: {TOO_DEEP}")
    if _is_json(kind):
        return _from_text
    if _is(kind, *_LISTS):
        return _list_maker(_maker(where, kind.value_type, level + 1))
    if _is(kind, "struct"):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        found = {f.name: _maker(f"{where}.{f.name}", f.type, level + 1) for f in fields}
        require(len(found) == len(fields), f"{where} has a key twice")
        return lambda value: made(value, found)
    plain = _is(kind, "null", *_TEXTS, *_NUMBERS) or (level == 1 and _is(kind, "dictionary"))
    require(plain, f"{where} is {_shown(kind)}, which JSON does not have; cast it or take it out")
    return None


def made(values: dict[str, Any], make: dict[str, Make]) -> dict[str, Any]:
    """An object without the keys that have no value."""
    return {
        name: value if (maker := make[name]) is None else maker(value)
        for name, value in values.items()
        if value is not None
    }


def _list_maker(make: Make) -> Make:
    if make is None:
        return None
    return lambda values: [None if value is None else make(value) for value in values]


def _from_text(text: str) -> Any:
    """Of Arrow's type for JSON, which `datasets` uses where objects differ. ConfigError."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"not valid JSON: {error}") from error
    check_bounds(value)
    return value


def _is(kind: Any, *names: str) -> bool:
    types = needed("pyarrow.types", "reading a table")
    return any(getattr(types, f"is_{name}")(kind) for name in names)


def _is_json(kind: Any) -> bool:
    return getattr(kind, "extension_name", None) == "arrow.json"


def _shown(kind: Any) -> str:
    text = str(kind)
    return text if len(text) <= 80 else f"{text[:80]}..."
