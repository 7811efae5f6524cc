"""Reads a Config, strictly, from a YAML file of sections and `section.key=value` overrides."""

import dataclasses
import datetime
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

from dspark_megatron.bounded_text import MOST_YAML_BYTES, parse_yaml, read_text
from dspark_megatron.config import Config
from dspark_megatron.config.objective.presets import check_new_preset, with_preset, with_terms
from dspark_megatron.config.objective.terms import whole_terms
from dspark_megatron.config.rules import SHOWN, one_of, shown
from dspark_megatron.errors import ConfigError, require

RENAMED = {"target.check_teacher_logits": "target.check_logits"}
"""Keys of older versions, which saved configs still have."""
PARTS = {
    "model": ("attention",),
    "loss": ("terms", "weighting"),
    "optimizer": ("lr_scale",),
}
"""Keys of sections that have keys of their own."""
ELSEWHERE = {
    "learning_rate": ("lr",),
    "batch_size": ("global_batch_size",),
    "max_steps": ("iterations",),
    "train_iters": ("iterations",),
    "num_train_epochs": ("epochs",),
    "seq_length": ("max_length",),
    "max_seq_length": ("max_length",),
    "max_grad_norm": ("clip_grad",),
    "save_steps": ("save_every",),
    "bf16": ("dtype",),
}
"""What Transformers and Megatron-LM call keys that have other names here."""
MOST_NAME_BYTES = 255
"""Of a file's name, on the usual file systems."""
MOST_TEXT = 4000
"""Letters of a setting: more than a path can have."""


def load_config(
    path: str | Path | None,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    trains: bool = True,
) -> Config:
    """The checked config of a YAML file with overrides, or of the overrides alone if there is no
    file. trains: whether what only training needs must be given.

    Raises ConfigError for an unreadable file, an unknown key (naming the nearest valid one), a
    value of the wrong type, or settings that contradict each other.
    """
    raw = _with_new_names(_sections_of(path)) if path is not None else {}
    changes = _with_new_names(nested_overrides(overrides))
    raw, changes = with_terms(raw, changes)
    merged = merged_sections(raw, changes)
    config = config_from_dict(merged)
    config.validate(trains=trains)
    check_new_preset(raw, changes, merged)
    return config


def _sections_of(path: str | Path) -> dict[str, Any]:
    raw = parse_yaml(read_text(path, MOST_YAML_BYTES), str(path))
    require(
        raw is None or isinstance(raw, dict),
        f"{path} must hold sections (a YAML mapping), not a {type(raw).__name__}",
    )
    return raw or {}


def config_from_dict(raw: dict[str, Any]) -> Config:
    """The Config of a dict of sections. Keys and values are checked, the rules between them are
    not."""
    return _build(Config, with_preset(_with_new_names(raw)), prefix="")


def _with_new_names(raw: dict[str, Any]) -> dict[str, Any]:
    """The sections, with keys of older versions under the names that they have now."""
    for old, new in RENAMED.items():
        (section, old_key), (_, new_key) = old.split("."), new.split(".")
        values = raw.get(section)
        if isinstance(values, dict) and old_key in values:
            require(new_key not in values, f"{old} is now called {new}; give one of the two")
            values = {new_key if key == old_key else key: v for key, v in values.items()}
            raw = {**raw, section: values}
    return raw


def nested_overrides(overrides: typing.Iterable[str]) -> dict[str, dict[str, Any]]:
    """`section.key=value` texts, or `section.part.key=value`, as a dict of sections."""
    sections: dict[str, dict[str, Any]] = {}
    for override in overrides:
        name, separator, text = override.partition("=")
        section, dot, key = name.partition(".")
        require(
            bool(separator and dot and key),
            f"override {shown(override)} must look like section.key=value",
        )
        *parts, last = key.split(".")
        require(
            not parts or parts[0] in PARTS.get(section, ()),
            f"override {shown(override)} must give a key whole, as section.key=value; only "
            f"{_parts()} have keys of their own",
        )
        values = sections.setdefault(section, {})
        for part in parts:
            values = values.setdefault(part, {})
            require(
                isinstance(values, dict),
                f"override {shown(override)} is of a key that another "
                "override gives a whole value; give one of the two",
            )
        value = parse_yaml(text, f"override {shown(override)}")
        values[last] = whole_terms(value) if name == "loss.terms" else value
    return sections


def _parts() -> str:
    names = [f"{section}.{part}" for section, parts in PARTS.items() for part in parts]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def merged_sections(raw: dict[str, Any], changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The sections with the changes: key by key, those of PARTS too."""
    merged = dict(raw)
    for section, values in changes.items():
        old = {} if merged.get(section) is None else merged[section]
        require(isinstance(old, dict), f"section {section!r} must be a mapping")
        merged[section] = {**old, **values}
        for key in PARTS.get(section, ()):
            before, change = old.get(key), values.get(key)
            if isinstance(before, dict) and isinstance(change, dict):
                merged[section][key] = {**before, **change}
    return merged


def _build(cls: type, raw: dict[str, Any], prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if key not in fields:
            elsewhere = [own for own in ELSEWHERE.get(str(key), ()) if own in fields]
            near = elsewhere or difflib.get_close_matches(str(key)[:SHOWN], fields, n=1, cutoff=0.4)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"valid: {', '.join(fields)}"
            raise ConfigError(f"unknown config key {name[:SHOWN]}; {hint}")
        kind: Any = fields[key].type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            keys = f" of {', '.join(f.name for f in dataclasses.fields(kind))}" if prefix else ""
            require(
                value is None or isinstance(value, dict),
                f"{name} must be a section (a YAML mapping{keys}), got {shown(value)}",
            )
            values[key] = _build(kind, value or {}, prefix=f"{name}.")
        else:
            values[key] = _convert(name, value, kind)
    return cls(**values)


def _convert(name: str, value: Any, kind: Any) -> Any:
    """A YAML value as the field's type. Only conversions that lose nothing are made."""
    if isinstance(kind, types.UnionType):  # X | None
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    plain, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if plain is Literal:
        one_of(name, value, inner)
        return value
    if plain is list and isinstance(value, list):
        return [_convert(f"{name}[{i}]", v, inner[0]) for i, v in enumerate(value)]
    if plain is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        value = _number(name, value)
    if plain is str and type(value) is datetime.date:
        return value.isoformat()  # YAML makes a date of an unquoted 2026-01-31
    if type(value) is not plain:
        wanted = kind if inner else kind.__name__
        raise ConfigError(f"{name} must be of type {wanted}, got {shown(value)}")
    if isinstance(value, str):
        _check_text(name, value)
    return value


def _number(name: str, value: int | float | str) -> Any:
    """As a finite float, also where YAML 1.1 reads 6e-4 as a text; any other text as it is."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except ValueError:
        return value
    require(math.isfinite(number), f"{name} ({shown(value)}) must be a finite number")
    return number


def _check_text(name: str, value: str) -> None:
    """ConfigError for a text that no file can have for its name, or that cannot be saved."""
    require(
        not any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in value),
        f"{name} ({shown(value)}) must be text in UTF-8 without null characters",
    )
    longest = max(len(part.encode()) for part in value.split("/"))
    require(
        longest <= MOST_NAME_BYTES,
        f"{name} ({shown(value)}) has a part of {longest:,} bytes between slashes, and a file's "
        f"name has at most {MOST_NAME_BYTES}",
    )
    require(
        len(value) <= MOST_TEXT,
        f"{name} ({shown(value)}) must have at most {MOST_TEXT:,} letters, has {len(value):,}",
    )
