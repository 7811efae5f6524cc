"""The checks that the sections of a config share. Each raises ConfigError."""

import dataclasses
import difflib
from typing import Any, Literal, get_args, get_origin

from dspark_megatron.errors import ConfigError, require


def check_choices(name: str, section: Any) -> None:
    """Every field of a `Literal` type must have one of its values."""
    for field in dataclasses.fields(section):
        if get_origin(field.type) is Literal:
            one_of(f"{name}.{field.name}", getattr(section, field.name), get_args(field.type))


def one_of(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} ({value!r}) must be one of {', '.join(valid)}{hint}")


def positive(name: str, section: Any, *fields: str) -> None:
    """These fields must be > 0, or null where they may be."""
    for field in fields:
        value = getattr(section, field)
        require(value is None or value > 0, f"{name}.{field} ({value}) must be > 0")


def not_negative(name: str, section: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(section, field)
        require(value >= 0, f"{name}.{field} ({value}) must be >= 0")
