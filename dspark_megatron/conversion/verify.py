"""Read an export back as strictly as the strictest engine, and compare it with its sources."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from dspark_megatron.config import require
from dspark_megatron.conversion.export import shape_problems, target_problems
from dspark_megatron.conversion.hf_config import hugging_face_config, shape_of_config
from dspark_megatron.conversion.megatron_checkpoint import CheckpointReader, find_checkpoint
from dspark_megatron.conversion.names import (
    EMBEDDING,
    LM_HEAD,
    compare_tensors,
    hugging_face_shapes,
    raise_if_any,
    to_hugging_face,
)
from dspark_megatron.shape import DraftShape
from dspark_megatron.target_folder import (
    load_target_config,
    read_tensor,
    shared_weights,
    tensor_files,
    tensor_shapes,
)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def verify_export(
    output_dir: str | Path,
    checkpoint: str | Path | None = None,
    target_dir: str | Path | None = None,
    iteration: int | None = None,
) -> list[str]:
    """Check an export: names, shapes, types, finite values, `config.json`; with target_dir the
    embedding, the LM head and the special tokens; with checkpoint every trained tensor, bit by bit.

    Returns a few lines that say what was checked. Raises ConfigError that lists every problem.
    """
    folder = Path(output_dir)
    require((folder / "config.json").is_file(), f"{folder} has no config.json: it is no export")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = shape_of_config(config)
    target_config = load_target_config(target_dir) if target_dir else None
    reader = CheckpointReader(find_checkpoint(checkpoint, iteration)) if checkpoint else None

    found = tensor_shapes(folder)
    has_shared = EMBEDDING in found or LM_HEAD in found
    expected = hugging_face_shapes(shape, shared_weights=has_shared)
    problems = _config_problems(config, shape, target_config, reader)
    problems += compare_tensors(expected, found) + _file_problems(folder)
    raise_if_any(problems, str(folder))

    dtype = DTYPES[config["dtype"]]
    problems = _value_problems(folder, dtype)
    summary = [
        f"{folder}: {len(found)} tensors, {sum(map(_numel, found.values())):,} parameters, "
        f"{config['dtype']}, names and shapes as expected",
        f"config.json: {len(config)} keys, taps {list(shape.target_layer_ids)} of "
        f"{shape.num_target_layers} layers, block size {shape.block_size}, "
        f"Markov {shape.markov_head_type} of rank {shape.markov_rank}",
    ]
    if target_dir is not None and has_shared:
        problems += _shared_problems(folder, target_dir, dtype)
        summary.append(f"embedding and LM head equal the target's ({target_dir})")
    if reader is not None:
        for name, tensor in to_hugging_face(reader.shape, reader.tensor):
            problems += _difference(folder, name, tensor, dtype)
        summary.append(f"every trained tensor equals the checkpoint's ({reader.path})")
    raise_if_any(problems, str(folder))
    return summary


def _config_problems(
    config: dict[str, Any], shape: DraftShape, target_config: Any, reader: CheckpointReader | None
) -> list[str]:
    """Every key of the layout, the copies in dflash_config, and what the sources say."""
    if config.get("dtype") not in DTYPES:
        return [f"dtype ({config.get('dtype')!r}) must be one of {', '.join(DTYPES)}"]
    nested = config.get("dflash_config", {})
    meta = {
        "num_anchors": config.get("num_anchors"),
        "initializer_range": config.get("initializer_range"),
        "confidence_head_alpha": nested.get("confidence_head_alpha"),
    }
    problems = shape_problems(shape)
    if reader is not None:
        ours, theirs = shape.to_dict(), reader.shape.to_dict()
        problems += [
            f"{key} is {ours[key]} in config.json and {theirs[key]} in the checkpoint"
            for key in ours
            if ours[key] != theirs[key]
        ]
        meta = {key: reader.meta[key] for key in meta}
    wanted = hugging_face_config(
        shape,
        **meta,
        target_config=target_config or AutoConfig.for_model("qwen3"),
        dtype=DTYPES[config["dtype"]],
    )
    if target_config is None:  # nothing to compare the special tokens with
        wanted |= {key: config[key] for key in config if key.endswith("_token_id")}
    else:
        problems += target_problems(shape, target_config)
    problems += _different_keys(wanted, config, "")
    return problems + _different_keys(wanted["dflash_config"], nested, "dflash_config.")


def _different_keys(wanted: dict[str, Any], found: dict[str, Any], prefix: str) -> list[str]:
    """Keys that are missing or have another value; keys that the layout lacks are left alone."""
    missing = [f"config.json lacks {prefix}{key}" for key in wanted if key not in found]
    return missing + [
        f"config.json: {prefix}{key} must be {value!r}, is {found[key]!r}"
        for key, value in wanted.items()
        if key in found and key != "dflash_config" and found[key] != value
    ]


def _file_problems(folder: Path) -> list[str]:
    """Files that an engine would read although they are not part of the export, and marks."""
    files = set(tensor_files(folder).values())
    problems = [
        f"{path.name} is not in the index, but engines may load it"
        for path in sorted(folder.glob("*.safetensors"))
        if path not in files
    ]
    for path in sorted(files):
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != "pt":
                problems.append(f'{path.name} lacks the metadata {{"format": "pt"}}')
    return problems


def _value_problems(folder: Path, dtype: torch.dtype) -> list[str]:
    problems = []
    for name in tensor_files(folder):
        tensor = read_tensor(folder, name)
        if tensor.dtype != dtype:
            problems.append(f"{name} must be {dtype}, is {tensor.dtype}")
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            problems.append(f"{name} has {bad} values that are not finite")
    return problems


def _shared_problems(folder: Path, target_dir: str | Path, dtype: torch.dtype) -> list[str]:
    problems = []
    for name, theirs in zip((EMBEDDING, LM_HEAD), shared_weights(target_dir), strict=True):
        problems += _difference(folder, name, read_tensor(target_dir, theirs), dtype)
    return problems


def _difference(folder: Path, name: str, source: Tensor, dtype: torch.dtype) -> list[str]:
    if torch.equal(read_tensor(folder, name), source.to(dtype)):
        return []
    return [f"{name} differs from its source"]


def _numel(size: tuple[int, ...]) -> int:
    return int(torch.Size(size).numel())
