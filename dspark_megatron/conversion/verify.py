"""Read a draft folder strictly, compare it with its sources, say which engines load it."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.engines.verdicts import Verdict, engine_verdicts
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.conversion.layouts.names import raise_if_any
from dspark_megatron.conversion.layouts.table import config_of_draft
from dspark_megatron.conversion.sidecar import SIDECAR, check_sidecar
from dspark_megatron.conversion.sources import CheckpointSource
from dspark_megatron.conversion.target_match import (
    difference,
    not_finite,
    shape_problems,
    target_problems,
    targets_shared,
)
from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.safetensors_folder import open_safetensors
from dspark_megatron.storage.target_folder import load_target_config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def verify_folder(
    folder_dir: str | Path,
    *,
    layout: str = "auto",
    checkpoint: str | Path | None = None,
    target_dir: str | Path | None = None,
    iteration: int | str | None = None,
    target_checkpoint: str | Path = "",
) -> list[str]:
    """Check names, shapes, types, finite values, config; with target_dir whether the draft is this
    target's; with checkpoint the draft's shape and every trained tensor bit by bit; with both also
    every other config key.

    Returns lines that say what was checked, and for each engine whether it loads the folder. Raises
    ConfigError that lists every problem of the folder itself.
    """
    target_config = load_target_config(target_dir) if target_dir else None
    facts = None
    if target_dir and target_config is not None:
        facts = TargetFacts.of(target_config, Path(target_dir).resolve().name)
    folder = DraftFolder(folder_dir, layout, facts)
    shape, dtype_name = folder.shape, _dtype_name(folder)
    problems = shape_problems(shape) + _file_problems(folder)
    if target_config is not None:
        problems += target_problems(shape, target_config)
    source = None
    if checkpoint:
        source = CheckpointSource(checkpoint, iteration)
        problems += _source_problems(folder, source, target_config)
    with_temperatures = False
    try:
        with_temperatures = check_sidecar(folder.path, shape.num_draft_tokens)
    except ConfigError as error:
        problems.append(str(error))
    if dtype_name not in DTYPES:
        problems.append(f"dtype ({dtype_name!r}) must be one of {', '.join(DTYPES)}")
    raise_if_any(problems, str(folder.path))

    assert dtype_name is not None
    summary = _summary(folder, dtype_name)
    if with_temperatures:
        summary.append(
            f"{SIDECAR}: a temperature for each of the {shape.num_draft_tokens} draft tokens"
        )
    sources: list[Iterable[tuple[str, Tensor]]] = []
    if target_dir is not None and folder.shared:
        sources.append(targets_shared(folder, target_dir, target_checkpoint))
        where = target_checkpoint or target_dir
        summary.append(f"{' and '.join(folder.shared)}: equal to the target's ({where})")
    if source is not None:
        sources.append(source.tensors())
        summary.append(f"every trained tensor equals the checkpoint's ({source.path})")
    problems = _value_problems(folder, DTYPES[dtype_name], chain.from_iterable(sources))
    raise_if_any(problems, str(folder.path))
    verdicts = engine_verdicts(
        folder.config,
        folder.files.shapes,
        folder_name=str(folder.path.resolve()),
        target_config=target_config,
    )
    return [*summary, *(line for verdict in verdicts for line in _verdict_lines(verdict))]


def _summary(folder: DraftFolder, dtype_name: str) -> list[str]:
    shape, sizes = folder.shape, folder.files.shapes.values()
    return [
        f"{folder.path}: layout {folder.layout.name}, {len(sizes)} tensors, "
        f"{sum(torch.Size(size).numel() for size in sizes):,} parameters, {dtype_name}, names and "
        "shapes as expected",
        f"config.json: taps {list(shape.target_layer_ids)} of {shape.num_target_layers} layers, "
        f"block size {shape.block_size}, Markov {shape.markov_head_type} of rank "
        f"{shape.markov_rank}",
    ]


def _dtype_name(folder: DraftFolder) -> str | None:
    backbone = folder.config.get("transformer_layer_config") or {}
    for config in (folder.config, backbone):
        name = config.get("dtype") or config.get("torch_dtype")
        if name:
            return str(name).removeprefix("torch.")
    return None


def _source_problems(
    folder: DraftFolder, source: CheckpointSource, target_config: Any
) -> list[str]:
    """What the config says otherwise than the checkpoint that it was exported from."""
    ours, theirs = folder.shape.to_dict(), source.description.shape.to_dict()
    problems = [
        f"{key} is {ours[key]} in config.json and {theirs[key]} in the checkpoint"
        for key in ours
        if ours[key] != theirs[key]
    ]
    if target_config is None or folder.config.get("dtype") not in DTYPES:
        return problems
    dtype = DTYPES[folder.config["dtype"]]
    facts = TargetFacts.of(target_config, "")
    wanted = config_of_draft(
        folder.layout, source.description, target_config=target_config, facts=facts, dtype=dtype
    )
    return problems + list(_different_keys(wanted, folder.config, "config.json: "))


def _different_keys(wanted: dict[str, Any], found: dict[str, Any], where: str) -> Iterator[str]:
    """Keys that are missing or have another value, nested ones too. Keys that the layout lacks are
    left alone, and so is the target's name, which is the exporter's choice."""
    for key, value in wanted.items():
        if key not in found:
            yield f"{where}lacks {key}"
        elif isinstance(value, dict) and isinstance(found[key], dict) and key != "rope_parameters":
            yield from _different_keys(value, found[key], f"{where}{key}.")
        elif found[key] != value and key != "name_or_path":
            yield f"{where}{key} must be {value!r}, is {found[key]!r}"


def _file_problems(folder: DraftFolder) -> list[str]:
    """Files that an engine would read although they are not part of the draft, and marks."""
    files = set(folder.files.files.values())
    problems = [
        f"{path.name} is not in the index, but engines may load it"
        for path in sorted(folder.path.glob("*.safetensors"))
        if path not in files
    ]
    for path in sorted(files):
        with open_safetensors(path) as file:
            if (file.metadata() or {}).get("format") != "pt":
                problems.append(f'{path.name} lacks the metadata {{"format": "pt"}}')
    return problems


def _value_problems(
    folder: DraftFolder, dtype: torch.dtype, sources: Iterable[tuple[str, Tensor]]
) -> list[str]:
    """What is wrong with the values. sources: tensors that the folder's own must equal, each of
    which is read once."""
    problems, others = [], dict.fromkeys(folder.names())
    for name, theirs in sources:
        del others[name]
        tensor = folder.tensor(name)
        problems += _own_problems(name, tensor, dtype) + difference(name, tensor, theirs)
    for name in others:
        problems += _own_problems(name, folder.tensor(name), dtype)
    return problems


def _own_problems(name: str, tensor: Tensor, dtype: torch.dtype) -> list[str]:
    wrong = [] if tensor.dtype == dtype else [f"{name} must be {dtype}, is {tensor.dtype}"]
    return wrong + not_finite(name, tensor)


def _verdict_lines(verdict: Verdict) -> list[str]:
    lines = [f"{verdict.engine}: {'loads' if verdict.loads else 'does not load'}"]
    lines += [f"  {problem}" for problem in verdict.problems]
    return lines + [f"  note: {warning}" for warning in verdict.warnings]
