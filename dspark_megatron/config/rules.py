"""The checks that the sections of a config share. Each raises ConfigError."""

import dataclasses
import difflib
from typing import Any, Literal, get_args, get_origin

from dspark_megatron.errors import ConfigError, require

SHOWN = 200
"""Letters of a value in a message."""
MOST = {
    "model.num_layers": 1000,
    "model.block_size": 1000,
    "model.num_anchors": 10**6,
    **dict.fromkeys(("model.ffn_hidden_size", "model.markov_rank"), 10**6),
    **dict.fromkeys(("model.num_attention_heads", "model.num_key_value_heads"), 10**5),
    "model.head_dim": 10**5,
    "data.tokenize_workers": 10**4,
    "target.pass_memory_gib": 10**6,
    "parallel.tensor_parallel": 10**5,
    "train.epochs": 10**6,
    **dict.fromkeys(("train.seed", "evaluate.seed"), 2**63 - 1),
}
"""Limits of settings: far beyond what has been trained, and of a size that can be planned for."""
MOST_INTEGER = 10**9
"""The limit of every other setting that is an integer, and of those in lists."""


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, or too deep
        return f"a value of type {type(value).__name__} that is too long to be shown"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def check_choices(name: str, section: Any) -> None:
    """Every field of a `Literal` type must have one of its values."""
    for field in dataclasses.fields(section):
        full, value = f"{name}.{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            check_choices(full, value)
        elif get_origin(field.type) is Literal:
            one_of(full, value, get_args(field.type))


def check_bounds(name: str, section: Any) -> None:
    """No number may be larger than its limit: it would be planned for without end."""
    for field in dataclasses.fields(section):
        full, value = f"{name}.{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            check_bounds(full, value)
        most = MOST.get(full, MOST_INTEGER)
        for number in value if isinstance(value, list) else [value]:
            require(
                not (isinstance(number, int) or full in MOST) or abs(number or 0) <= most,
                f"{full} ({shown(value)}) must be at most {most:,}",
            )


def one_of(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        text = value[:SHOWN].lower() if isinstance(value, str) else ""
        near = difflib.get_close_matches(text, valid, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} ({shown(value)}) must be one of {', '.join(valid)}{hint}")


def positive(name: str, section: Any, *fields: str) -> None:
    """These fields must be > 0, or null where they may be."""
    for field in fields:
        value = getattr(section, field)
        require(value is None or value > 0, f"{name}.{field} ({value}) must be > 0")


def not_negative(name: str, section: Any, *fields: str) -> None:
    """These fields must be >= 0, or null where they may be."""
    for field in fields:
        value = getattr(section, field)
        require(value is None or value >= 0, f"{name}.{field} ({value}) must be >= 0")
