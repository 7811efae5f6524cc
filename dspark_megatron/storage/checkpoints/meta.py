"""`dspark.json`: what a checkpoint is. Read here alone, so that all who use it find what they look
for in it.
"""

import dataclasses
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any

from dspark_megatron.errors import require
from dspark_megatron.shape import DraftShape
from dspark_megatron.shape.attention import DraftAttention
from dspark_megatron.storage.checkpoints.damage import Damage
from dspark_megatron.storage.checkpoints.metadata import META

FORMAT = 1
_LARGEST = 2**53
_REQUIRED: dict[str, type] = {
    "shape": dict,
    "num_anchors": int,
    "initializer_range": float,
    "confidence_head_alpha": float,
    "target_fingerprint": str,
}
_OF_ONE = {"iteration": int, "consumed_samples": int}
"""Beside each checkpoint of our own loop; Megatron's has one file for all."""
_OPTIONAL: dict[str, type] = {
    "open_metrics": list,
    "best": dict,
    "weights_only": bool,
    "num_samples": int,
    "skipped_steps": int,
    "resumed_from": int,
    "seed": int,
    "lr_scale": dict,
    "loss": dict,
    "target_logits": dict,
    "optimizer": dict,
    "ema_decay": float,
    "data_fingerprint": str,
    "template_date": str,
}
_BEST = {"iteration": int, "tau": float, "conditions": dict}
_KINDS = {
    int: "a whole number, not negative",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object of keys",
}


def iteration_of(path: Path) -> int | None:
    """The number in the name of an `iter_*` folder; None for anything else."""
    match = re.fullmatch(r"iter_([0-9]{1,15})", path.name)
    return int(match[1]) if match and path.is_dir() else None


def parse_meta(path: Path) -> dict[str, Any]:
    """What `dspark.json` says of a checkpoint folder. Damage where it is not there or lacks a key;
    ConfigError for another format. Megatron's `pretrain()` has one for all of its checkpoints,
    beside them, which says no iteration where the folder of all is asked for."""
    file, iteration = path / META, iteration_of(path)
    of_all = iteration is not None and not file.is_file() and (path.parent / META).is_file()
    if of_all:
        file = path.parent / META
    if not file.is_file():
        raise Damage(f"{path} has no {META}: it is not a complete checkpoint of dspark-megatron")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Damage.of(file, error) from error
    if not isinstance(meta, dict):
        raise Damage.of(file, f"it holds {type(meta).__name__}, no object of keys")
    require(
        meta.get("format") == FORMAT,
        f"{file} has format {meta.get('format')!r:.80}, this version reads format {FORMAT}; "
        "use the version that wrote it",
    )
    of_folder = iteration is None and "iteration" not in meta and "global_batch_size" in meta
    own = {"global_batch_size": int} if of_all or of_folder else _OF_ONE
    problem = _problem(meta, _REQUIRED | own, _OPTIONAL)
    problem = problem or _shape_problem(meta["shape"]) or _best_problem(meta.get("best"))
    if problem:
        raise Damage.of(file, problem)
    if of_all:
        assert iteration is not None
        consumed = iteration * meta["global_batch_size"]
        return meta | {"iteration": iteration, "consumed_samples": consumed}
    if not of_folder and iteration not in (None, meta["iteration"]):
        raise Damage.of(file, f"it is of iteration {meta['iteration']}")
    return meta


def _problem(
    raw: dict[str, Any], required: dict[str, type], optional: dict[str, type], prefix: str = ""
) -> str:
    """The first key that is missing or has a value of another kind; empty if all is well."""
    for name, kind in (required | optional).items():
        value = raw.get(name)
        if value is None and name in optional:
            continue
        if name not in raw:
            return f"it lacks {prefix}{name}"
        if not _is(value, kind):
            return f"{prefix}{name} is {value!r:.80} and must be {_KINDS[kind]}"
    return ""


def _is(value: Any, kind: type) -> bool:
    if kind is int:
        return type(value) is int and 0 <= value <= _LARGEST
    if kind is float:
        return type(value) in (int, float) and abs(value) <= _LARGEST and math.isfinite(value)
    return isinstance(value, kind)


def _shape_problem(shape: dict[str, Any]) -> str:
    hints = typing.get_type_hints(DraftShape)
    kinds = {field.name: _plain(hints[field.name]) for field in dataclasses.fields(DraftShape)}
    if unknown := sorted(shape.keys() - kinds.keys()):
        return f"it has an unknown shape.{unknown[0]:.80}"
    young = {name: kinds.pop(name) for name in DraftShape.young_defaults()}
    if problem := _problem(shape, kinds, young, "shape."):
        return problem
    if problem := _attention_problem(shape.get("attention")):
        return problem
    layers = shape["target_layer_ids"]
    if not all(type(layer) is int for layer in layers):
        return f"shape.target_layer_ids is {layers!r:.80} and must be a list of whole numbers"
    return ""


def _attention_problem(attention: dict[str, Any] | None) -> str:
    if attention is None:
        return ""
    kinds = {name: _plain(hint) for name, hint in typing.get_type_hints(DraftAttention).items()}
    if unknown := sorted(attention.keys() - kinds.keys()):
        return f"it has an unknown shape.attention.{unknown[0]:.80}"
    optional = {"window": kinds.pop("window")}
    if problem := _problem(attention, kinds, optional, "shape.attention."):
        return problem
    for name in ("sliding_layers", "causal_layers"):
        if not all(type(layer) is int for layer in attention[name]):
            return f"shape.attention.{name} is {attention[name]!r:.80} and must list whole numbers"
    return ""


def _plain(hint: Any) -> type:
    """`dict[str, Any]` -> dict, `X | None` -> X; JSON has a list where a shape has a tuple, and an
    object of keys for a part of it."""
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    plain = typing.get_origin(hint) or hint
    if dataclasses.is_dataclass(plain):
        return dict
    return list if plain is tuple else plain


def _best_problem(best: dict[str, Any] | None) -> str:
    if not best:
        return ""
    if unknown := sorted(best.keys() - _BEST.keys()):
        return f"it has an unknown best.{unknown[0]:.80}"
    return _problem(best, _BEST, {}, "best.")
