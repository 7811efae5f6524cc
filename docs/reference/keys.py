"""The reference of all config keys, from the dataclasses of the config and what is written below
each field. `make docs` makes a page of it; nothing else is needed to read the keys.
"""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from types import UnionType
from typing import Any

from dspark_megatron.config import Config

INTRODUCTION = """\
# Config keys

All keys of a run's YAML file, by section, with type and default. On the command line a key is
`section.key=value`. The [page of training](training.md) shows which of them most runs set.
"""


def key_reference() -> str:
    """The page, in Markdown."""
    parts = [INTRODUCTION]
    for section in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[section.name]
        parts += [f"## {section.name}", _text(kind.__doc__), *_keys(kind, section.name)]
    return "\n\n".join(parts) + "\n"


def _keys(kind: type, prefix: str) -> Iterator[str]:
    written, types = attribute_docstrings(kind), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, of = f"{prefix}.{field.name}", types[field.name]
        yield f"### {name}"
        if dataclasses.is_dataclass(of):
            yield written.get(field.name, _text(of.__doc__))
            yield from _keys(of, name)
        else:
            yield f"`{_type_name(of)}`, default `{_default(field)}`"
            yield written[field.name]


def attribute_docstrings(kind: type) -> dict[str, str]:
    """What is written below each field of a class and of those that it is made of."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                found[field.target.id] = _text(text.value.value)
    return found


def _text(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(kind)))
    if isinstance(kind, UnionType):
        return " | ".join(map(_type_name, typing.get_args(kind)))
    if kind is type(None):
        return "null"
    return str(kind) if typing.get_args(kind) else kind.__name__


def _default(field: dataclasses.Field) -> str:
    made = field.default_factory
    value = made() if made is not dataclasses.MISSING else field.default
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)
