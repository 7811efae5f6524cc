"""Read a draft folder strictly, compare it with its sources, say which engines load it."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.config.evaluate import Weights
from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.engines.verdicts import Verdict, engine_verdicts
from dspark_megatron.conversion.layouts.attention_config import lookup
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.conversion.layouts.names import raise_if_any
from dspark_megatron.conversion.layouts.variants import layout_notes
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


@dataclass(frozen=True)
class FolderReport:
    """What a sound folder holds, and what the engines make of it."""

    layout: str
    checked: list[str]
    verdicts: list[Verdict]

    def lines(self) -> list[str]:
        return [*self.checked, *(line for one in self.verdicts for line in _verdict_lines(one))]

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        engines = [{"loads": one.loads, **vars(one)} for one in self.verdicts]
        return {"layout": self.layout, "checked": self.checked, "engines": engines}


def verify_folder(folder_dir: str | Path, **options: Any) -> list[str]:
    """The lines of `check_folder`."""
    return check_folder(folder_dir, **options).lines()


def check_folder(
    folder_dir: str | Path,
    *,
    layout: str = "auto",
    checkpoint: str | Path | None = None,
    target_dir: str | Path | None = None,
    iteration: int | str | None = None,
    weights: Weights = "trained",
    target_checkpoint: str | Path = "",
    allow_unknown: Collection[str] = (),
) -> FolderReport:
    """Check names, shapes, types, finite values, config; with target_dir whether the draft is this
    target's; with checkpoint what the config says of the draft, in whatever spelling, and every
    trained tensor bit by bit. allow_unknown: as DraftFolder has it.

    Raises ConfigError that lists every problem of the folder itself.
    """
    target_config = load_target_config(target_dir) if target_dir else None
    facts = None
    if target_dir and target_config is not None:
        facts = TargetFacts.of(target_config, Path(target_dir).resolve().name)
    folder = DraftFolder(folder_dir, layout, facts, allow_unknown=allow_unknown)
    shape, dtypes = folder.shape, _declared_types(folder)
    problems = shape_problems(shape)
    if target_config is not None:
        problems += target_problems(shape, target_config)
        problems += _token_problems(folder.config, target_config)
    source = None
    if checkpoint:
        source = CheckpointSource(checkpoint, iteration, weights)
        problems += _source_problems(folder, source)
    with_temperatures = False
    try:
        with_temperatures = check_sidecar(folder.path, shape.num_draft_tokens)
    except ConfigError as error:
        problems.append(str(error))
    if len(dtypes) > 1 or dtypes - DTYPES.keys():
        problems.append(f"dtype ({', '.join(sorted(dtypes))}) must be one of {', '.join(DTYPES)}")
    raise_if_any(problems, str(folder.path))

    dtype = DTYPES[dtypes.pop()] if dtypes else None
    summary = _summary(folder) + [f"note: {note}" for note in _notes(folder, dtype)]
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
        of = "checkpoint's" if weights == "trained" else "moving average in the checkpoint"
        summary.append(f"every trained tensor equals the {of} ({source.path})")
    # An export has one type; folders of others may hold some tensors in another one.
    exact = dtype if source is not None else None
    problems = _value_problems(folder, exact, chain.from_iterable(sources))
    raise_if_any(problems, str(folder.path))
    verdicts = engine_verdicts(
        folder.config,
        folder.files.shapes,
        folder_name=str(folder.path.resolve()),
        target_config=target_config,
    )
    return FolderReport(folder.layout.name, summary, verdicts)


def _summary(folder: DraftFolder) -> list[str]:
    shape, sizes = folder.shape, folder.files.shapes.values()
    types = sorted({str(folder.dtype(name)).removeprefix("torch.") for name in folder.names()})
    return [
        f"{folder.path}: layout {folder.layout.name}, {len(sizes)} tensors, "
        f"{sum(torch.Size(size).numel() for size in sizes):,} parameters, {' and '.join(types)}, "
        "names and shapes as expected",
        f"config.json: taps {list(shape.target_layer_ids)} of {shape.num_target_layers} layers, "
        f"block size {shape.block_size}, Markov {shape.markov_head_type} of rank "
        f"{shape.markov_rank}",
    ]


def _declared_types(folder: DraftFolder) -> set[str]:
    """What config.json says of the type, in either spelling; empty where it does not."""
    backbone = folder.config.get("transformer_layer_config") or {}
    names = [c.get(key) for c in (folder.config, backbone) for key in ("dtype", "torch_dtype")]
    return {str(name).removeprefix("torch.") for name in names if name}


def _notes(folder: DraftFolder, dtype: torch.dtype | None) -> Iterator[str]:
    """What is no fault of the draft, and better known before it is served."""
    yield from folder.doubts
    yield from layout_notes(folder.layout.name, folder.shape)
    if dtype is None:
        yield "config.json has no dtype: engines take one of their own"
    others = [name for name in folder.names() if dtype not in (None, folder.dtype(name))]
    if others:
        yield f"{len(others)} tensors are of another type than {dtype} (such as {others[0]})"
    verifier = lookup(folder.config, "speculators_config.verifier.name_or_path")
    is_id = isinstance(verifier, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", verifier)
    if folder.layout.name == "speculators" and not is_id and not _is_path(verifier):
        yield (
            f"the verifier is called {verifier!r}, which is neither a folder here nor a hub id "
            "(org/name); the speculators library and vLLM's `vllm serve DRAFT` look for the target "
            "by it: give --target-name org/name when exporting"
        )
    for path in sorted(set(folder.files.files.values())):
        with open_safetensors(path) as file:
            if (file.metadata() or {}).get("format") != "pt":
                yield f'{path.name} lacks the metadata {{"format": "pt"}}; old readers want it'


def _is_path(name: Any) -> bool:
    return (
        isinstance(name, str)
        and "\0" not in name
        and Path(name).is_absolute()
        and Path(name).is_dir()
    )


def _source_problems(folder: DraftFolder, source: CheckpointSource) -> list[str]:
    """What the config says otherwise than the checkpoint that it was exported from. Facts that it
    does not say are no problem."""
    ours, theirs = folder.shape.to_dict(), source.description.shape.to_dict()
    said = {**(folder.config.get("dflash_config") or {}), **folder.config}
    facts, wanted = folder.description.facts(), source.description.facts()
    ours |= {key: value for key, value in facts.items() if said.get(key) is not None}
    theirs |= wanted
    return [
        f"{key} is {ours[key]} in config.json and {theirs[key]} in the checkpoint"
        for key in ours
        if ours[key] != theirs[key]
    ]


def _token_problems(config: dict[str, Any], target_config: Any) -> list[str]:
    """Special tokens that are there and not the target's."""
    text = target_config.get_text_config()
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return [
        f"{key} must be the target's {getattr(text, key)!r}, is {config[key]!r}"
        for key in keys
        if config.get(key) is not None and config[key] != getattr(text, key)
    ]


def _value_problems(
    folder: DraftFolder, dtype: torch.dtype | None, sources: Iterable[tuple[str, Tensor]]
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


def _own_problems(name: str, tensor: Tensor, dtype: torch.dtype | None) -> list[str]:
    wrong = [] if dtype in (None, tensor.dtype) else [f"{name} must be {dtype}, is {tensor.dtype}"]
    return wrong + not_finite(name, tensor)


def _verdict_lines(verdict: Verdict) -> list[str]:
    lines = [f"{verdict.engine}: {'loads' if verdict.loads else 'does not load'}"]
    lines += [f"  {problem}" for problem in verdict.problems]
    return lines + [f"  note: {warning}" for warning in verdict.warnings]
